"""Weights of objectives for uda."""

from uda_pareto.cagrad import CAGrad
from uda_pareto.fixed import FixedWeights
from uda_pareto.mgda import MGDA
from uda_pareto.pareto import ParetoDA
from uda_pareto.pcgrad import PCGrad
from uda_pareto.uncertainty import UncertaintyWeights

__all__ = ["MGDA", "CAGrad", "FixedWeights", "PCGrad", "ParetoDA", "UncertaintyWeights"]
