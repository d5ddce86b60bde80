"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM names them: adapters come and go while the
server runs.

Only where the server was started with a folder for it (`--allow-adapter-updates`): a path comes from whoever
may ask, and what it names is read.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from fastapi import APIRouter

from ...ir.errors import InputError, LlmcError, UnsupportedError
from ..adapters import AdapterInUseError
from .errors import ApiError, AsciiJsonResponse, hide_places
from .schema import LoadAdapterRequest, UnloadAdapterRequest
from .service import ServedModel, Service

_NAME = re.compile(r"[A-Za-z0-9_][\w.:-]{0,127}", re.ASCII)


def adapters_router(service: Service, folder: Path, most: int) -> APIRouter:
    """The endpoints, for adapters below `folder`; `most` are loaded at a time."""
    router = APIRouter()
    changing = asyncio.Lock()  # reading takes a while, and a name is one adapter's

    @router.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapterRequest) -> AsciiJsonResponse:
        """Serve an adapter of the server's folder under a name."""
        async with changing:
            base = _base(service, body.base_model_name)
            if _NAME.fullmatch(body.lora_name) is None:
                raise ApiError(
                    400,
                    "lora_name: letters, digits and _ . : - after the first, up to 128",
                    param="lora_name",
                    code="invalid_value",
                )
            if body.lora_name in service.models:
                raise ApiError(
                    409, f"{body.lora_name!r} is served here already", param="lora_name", code="name_taken"
                )
            if sum(model.base is not None for model in service.models.values()) >= most:
                raise ApiError(
                    409,
                    f"{most} adapters are loaded, and no more are taken; unload one",
                    param="lora_name",
                    code="too_many_adapters",
                )
            path = _inside(folder, body.lora_path)
            try:
                await service.prepare(base.llm.load_adapter, body.lora_name, path)
            except LlmcError as error:
                hide_places(error, {f"{folder.resolve()}/": ""})
                if not isinstance(error, UnsupportedError):
                    raise
                raise ApiError(400, str(error), param="lora_path", code="unsupported_adapter") from None
            return AsciiJsonResponse(service.add_adapter(base, body.lora_name).describe())

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapterRequest) -> AsciiJsonResponse:
        """Forget an adapter that no request uses."""
        async with changing:
            found = service.models.get(body.lora_name)
            if found is None or found.base is None:
                raise ApiError(
                    404,
                    f"no adapter {body.lora_name[:200]!r} is served here",
                    param="lora_name",
                    code="adapter_not_found",
                )
            try:
                await service.prepare(found.base.llm.unload_adapter, body.lora_name)
            except AdapterInUseError as error:
                raise ApiError(409, str(error), param="lora_name", code="adapter_in_use") from None
            del service.models[body.lora_name]
            return AsciiJsonResponse({"id": body.lora_name, "object": "model", "deleted": True})

    return router


def _base(service: Service, name: str | None) -> ServedModel:
    found = service.model(name)
    if found.base is not None:
        raise ApiError(
            400, f"{found.name!r} is an adapter", param="base_model_name", code="unsupported_model"
        )
    return found


def _inside(folder: Path, given: str) -> Path:
    """The folder or file that a request names, links followed. Raises InputError where it is not below
    `folder`.
    """
    root = folder.resolve()
    try:
        path = (root / given).resolve()
    except (OSError, ValueError):
        path = root
    if path == root or root not in path.parents:
        raise InputError(
            "lora_path is outside of the server's folder of adapters", remedy="name a folder or file in it"
        )
    return path
