"""Open-set adaptation for uda: the target has classes that the source lacks."""

from uda_openset.cobrf import CoBRF
from uda_openset.osbp import OSBP
from uda_openset.ros import ROS

__all__ = ["OSBP", "ROS", "CoBRF"]
