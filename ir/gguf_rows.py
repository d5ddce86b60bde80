"""Where the rows of a model's matrices stand in the GGUF file that it was compiled from: what an adapter in
llama.cpp's names and order of rows needs to change that model per request.

    {"architecture": "llama",
     "orders": [[[0, 2, 32], [1, 2, 32], …], …]          see row_orders.py
     "modules": {"model.layers.0.self_attn.q_proj": ["blk.0.attn_q.weight", 0], …}}

The order is null where rows are as the file has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .row_orders import Orders, Rows, order_at, read_orders

FILE = "gguf_rows.json"
"""Its name in an artifact."""


@dataclass(frozen=True, eq=False)
class GGUFRows:
    """A model's matrices in its GGUF file.

    Attributes:
        architecture: llama.cpp's name for it.
        modules: the tensor of each module, and its rows in the module's order (int64), or None where they are
            all of them, as they stand.
    """

    architecture: str
    modules: Mapping[str, tuple[str, Rows | None]]

    def to_json(self) -> dict[str, Any]:
        orders = Orders()
        modules = {module: [tensor, orders.place(rows)] for module, (tensor, rows) in self.modules.items()}
        return {"architecture": self.architecture, "orders": orders.runs, "modules": modules}

    @staticmethod
    def from_json(found: Any) -> GGUFRows:
        """Raises ValueError where it is not as `to_json` writes it."""
        try:
            orders = read_orders(found["orders"])
            modules = {
                str(module): (str(tensor), order_at(orders, place))
                for module, (tensor, place) in found["modules"].items()
            }
            return GGUFRows(str(found["architecture"]), modules)
        except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(str(error)) from error
