"""Discrepancy and statistics matching for uda."""

from uda_discrepancy.adabn import AdaBN
from uda_discrepancy.afn import AFN
from uda_discrepancy.can import CAN
from uda_discrepancy.coral import CORAL
from uda_discrepancy.dan import DAN
from uda_discrepancy.dsan import DSAN
from uda_discrepancy.dsbn import DSBN
from uda_discrepancy.jan import JAN

__all__ = ["AFN", "CAN", "CORAL", "DAN", "DSAN", "DSBN", "JAN", "AdaBN"]
