"""Domains of several readers in one run: files of two kinds, or files and generated domains."""

from __future__ import annotations

from uda.data.domains import DomainData
from uda.data.readers import Reader
from uda.errors import UDAError


class Several(Reader):
    """The domains of several readers side by side.

    Class names are joined as those of any two domains are, so readers must name a class alike; views make inputs of
    different sizes alike.

    Args:
        readers: whose domains have different names.
    """

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = list(readers)
        if not self.readers:
            raise UDAError("Several: give one reader or more under readers.")

    def _owners(self) -> dict[str, Reader]:
        """The reader of each domain.

        Raises:
            UDAError: two readers have a domain of one name.
        """
        out: dict[str, Reader] = {}
        for reader in self.readers:
            for name in reader.domains():
                if name in out:
                    raise UDAError(
                        f"Several: {type(out[name]).__name__} and {type(reader).__name__} both have a domain {name!r}; "
                        "which one is meant cannot be told."
                    )
                out[name] = reader
        return out

    def domains(self) -> list[str]:
        """Names of the domains of all readers."""
        return list(self._owners())

    def place(self, domain: str) -> str:
        """Where the readers look for a domain."""
        return ", ".join(told for r in self.readers if (told := r.place(domain)))

    def read(self, domain: str) -> DomainData:
        """Read one domain, by the reader that has it."""
        self._known(domain, "the readers")
        return self._owners()[domain].read(domain)
