"""TVM's modules without their types: its annotations contradict what it accepts (lists where tuples are
named, no members on Object), and every use would need an ignore.
"""

from __future__ import annotations

from typing import Any

import tvm as _tvm
from tvm import relax as _relax
from tvm import te as _te
from tvm import tirx as _tirx

tvm: Any = _tvm
relax: Any = _relax
te: Any = _te
tirx: Any = _tirx
Module = Any
"""A `tvm.IRModule`."""

__all__ = ["Module", "relax", "te", "tirx", "tvm"]
