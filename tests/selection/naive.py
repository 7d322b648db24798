"""Every score a second time: float64 loops over plain definitions, no shared code."""

from __future__ import annotations

import math

import numpy as np


def softmax(z):
    out = np.zeros_like(z, dtype=np.float64)
    for i, row in enumerate(np.asarray(z, np.float64)):
        e = [math.exp(v - max(row)) for v in row]
        out[i] = [v / sum(e) for v in e]
    return out


def entropy(p):
    return -sum(float(v) * math.log(v) for v in p if v > 0)


def negative_entropy(z):
    p = softmax(z)
    return -sum(entropy(row) for row in p) / len(p)


def diversity(z):
    p = softmax(z)
    return entropy([sum(p[i][c] for i in range(len(p))) / len(p) for c in range(p.shape[1])])


def information_maximisation(z):
    """As a mutual information: mean KL divergence of each prediction from the mean prediction."""
    p = softmax(z)
    mean = p.mean(0)
    return sum(v * math.log(v / m) for row in p for v, m in zip(row, mean, strict=True)) / len(p)


def bnm(z):
    p = softmax(z)
    n, c = p.shape
    return np.linalg.svd(p, compute_uv=False).sum() / math.sqrt(n * min(n, c))


def class_correlation(z):
    p = softmax(z)
    c = p.shape[1]
    matrix = np.zeros((c, c))
    for row in p:
        matrix += np.outer(row, row) / len(p)
    dot = sum(matrix[i, j] * (i == j) for i in range(c) for j in range(c))
    return dot / (math.sqrt((matrix**2).sum()) * math.sqrt(c))


def soft_neighbourhood_density(z, temperature=0.05):
    p = softmax(z)
    total = 0.0
    for i in range(len(p)):
        logits = []
        for j in range(len(p)):
            if j != i:
                cosine = p[i] @ p[j] / (np.linalg.norm(p[i]) * np.linalg.norm(p[j]))
                logits.append(cosine / temperature)
        total += entropy(softmax(np.array([logits]))[0])
    return total / len(p)


def rankme(x):
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return math.exp(-sum((v / s.sum() + 1e-7) * math.log(v / s.sum() + 1e-7) for v in s))


def iwv(w, e):
    return -sum(float(a) * float(b) for a, b in zip(w, e, strict=True)) / len(w)


def dev(w, e):
    w, e = [float(v) for v in w], [float(v) for v in e]
    n = len(w)
    loss = [a * b for a, b in zip(w, e, strict=True)]
    mean_l, mean_w = sum(loss) / n, sum(w) / n
    covariance = sum((a - mean_l) * (b - mean_w) for a, b in zip(loss, w, strict=True)) / (n - 1)
    variance = sum((b - mean_w) ** 2 for b in w) / (n - 1)
    eta = -covariance / variance
    return -(mean_l + eta * mean_w - eta)


def density_ratio(source, target, query, steps=20000, penalty=1.0):
    """L2-penalised logistic regression by plain gradient descent on standardised features."""
    x = np.concatenate((source, target)).astype(np.float64)
    mean, std = x.mean(0), x.std(0)
    y = np.array([0.0] * len(source) + [1.0] * len(target))
    x, q = (x - mean) / std, (np.asarray(query, np.float64) - mean) / std
    w, b, rate = np.zeros(x.shape[1]), 0.0, 1.0 / (len(x) * x.shape[1])
    for _ in range(steps):
        wrong = 1 / (1 + np.exp(-(x @ w + b))) - y
        w -= rate * (x.T @ wrong + w / penalty)
        b -= rate * wrong.sum()
    p = 1 / (1 + np.exp(-(q @ w + b)))
    return len(source) / len(target) * p / (1 - p)


def kmeans(x, centres, rounds=300):
    centres, labels = centres.copy(), None
    for _ in range(rounds):
        labels = np.array([int(np.argmin([((v - c) ** 2).sum() for c in centres])) for v in x])
        new = np.array([x[labels == k].mean(0) if (labels == k).any() else centres[k] for k in range(len(centres))])
        if np.allclose(new, centres):
            break
        centres = new
    return labels


def adjusted_mutual_information(a, b):
    """(I - E[I]) / (mean(H(a), H(b)) - E[I]), E over the hypergeometric model (Vinh et al. 2010)."""
    n, rows, columns = len(a), sorted(set(a)), sorted(set(b))
    count = np.array([[sum(1 for u, v in zip(a, b, strict=True) if u == r and v == c) for c in columns] for r in rows])
    sa, sb = count.sum(1), count.sum(0)
    info = expected = 0.0
    for i in range(len(rows)):
        for j in range(len(columns)):
            if count[i, j]:
                info += count[i, j] / n * math.log(n * count[i, j] / (sa[i] * sb[j]))
            for k in range(max(1, sa[i] + sb[j] - n), min(sa[i], sb[j]) + 1):
                ways = math.comb(int(sb[j]), k) * math.comb(int(n - sb[j]), int(sa[i] - k)) / math.comb(n, int(sa[i]))
                expected += ways * k / n * math.log(n * k / (sa[i] * sb[j]))
    mean = (entropy(sa / n) + entropy(sb / n)) / 2
    return (info - expected) / (mean - expected)


def class_clusters(x, z):
    labels, c = np.argmax(z, 1), z.shape[1]
    x = np.asarray(x, np.float64)
    centres = np.array([x[labels == k].mean(0) if (labels == k).any() else 0 * x[0] for k in range(c)])
    return adjusted_mutual_information(list(labels), list(kmeans(x, centres)))


def classifier_unevenness(weights):
    c, total = len(weights), 0.0
    for i in range(c):
        for j in range(c):
            if i != j:
                cosine = weights[i] @ weights[j] / (np.linalg.norm(weights[i]) * np.linalg.norm(weights[j]))
                total += (math.acos(cosine) - math.acos(-1 / (c - 1))) ** 2
    return total / (c * (c - 1))


def hopkins(x, points, chosen):
    """Given what was drawn: distances of points and of chosen samples to the nearest sample."""
    u = sum(min(math.dist(p, v) for v in x) for p in points)
    w = sum(min(math.dist(x[i], v) for j, v in enumerate(x) if j != i) for i in chosen)
    return u / (u + w)


def partner(labels, i, same):
    for step in range(1, len(labels)):
        j = (i + step) % len(labels)
        if (labels[j] == labels[i]) == same:
            return j
    return -1
