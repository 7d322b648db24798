"""Source-free adaptation for uda: a source model and unlabelled target data are all there is."""

from uda_sourcefree.aad import AaD
from uda_sourcefree.colearn import CoLearn
from uda_sourcefree.glc import GLC
from uda_sourcefree.glc_plus import GLCPlusPlus
from uda_sourcefree.lead import LEAD
from uda_sourcefree.lftl import LFTL
from uda_sourcefree.notela import NOTELA
from uda_sourcefree.nrc import NRC
from uda_sourcefree.shot import SHOT
from uda_sourcefree.shot_plus import SHOTPlusPlus

__all__ = ["GLC", "LEAD", "LFTL", "NOTELA", "NRC", "SHOT", "AaD", "CoLearn", "GLCPlusPlus", "SHOTPlusPlus"]
