"""Which engine serves a model folder: encoders read whole texts, all others generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from headrace.errors import UnsupportedModelError
from headrace.kernels.quantize import find_scheme
from headrace.workers.ahead import Rehearsed, rehearse
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.config import EngineConfig
from headrace.workers.describe import describe
from headrace.workers.device import pick_device
from headrace.workers.encoder_engine import EncoderEngine
from headrace.workers.engine import Engine
from headrace.workers.kv_size import check_before_loading, graph_memory, with_measured_cache
from headrace.workers.loader import loading
from headrace.workers.parallel_compile import prepare
from headrace.workers.served import start_token_of

__all__ = ["load_engine"]


def load_engine(
    folder: Path,
    config: EngineConfig,
    *,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Engine | EncoderEngine:
    """The engine of a model folder, cold.

    Args:
        folder: of the model.
        config: of the engine.
        name: what clients call the model; the folder's by default.
        progress: is told bytes done and bytes in all.

    Raises:
        ModelError: files are missing, damaged or do not fit each other, or the family is not covered.
        ConfigError: a setting does not fit the model.
    """
    checkpoint = Checkpoint(folder)
    if checkpoint.architecture in checkpoint.policy.tasks:
        raise UnsupportedModelError(
            f"{str(folder)!r} holds a {checkpoint.architecture}, whose head is not served: a pool makes vectors and "
            "fills masks. Use headrace.init_inference for it, or serve the model without its head.",
            param="model",
        )
    spec = checkpoint.spec
    card, blobs = describe(checkpoint, name=name, dtype=config.dtype, quantize=config.quantize)
    # Asked before the weights are read: who says what an answer begins with is seen at once.
    start_token = start_token_of(
        spec, card, checkpoint.read_json("generation_config.json").get("decoder_start_token_id")
    )
    device = pick_device(config.device)
    scheme = find_scheme(config.quantize, device)
    if device.type == "cuda":
        prepare()
    memory = check_before_loading(spec, card, config, checkpoint.dtype(config.dtype), device)
    rehearsed = Rehearsed()
    with loading(checkpoint, dtype=config.dtype, device=device, scheme=scheme, progress=progress) as under_way:
        if memory is not None and not spec.is_encoder:
            under_way.begin()
            rehearsed = rehearse(under_way.model, card, config, memory, start_token=start_token)
        model = under_way.finished().model
    if spec.is_encoder:
        graphs = graph_memory(model, card, config, memory)
        return EncoderEngine(model, card, config, blobs=blobs, graph_memory=graphs)
    sized = with_measured_cache(model, card, config, memory, start_token=start_token, compiled=rehearsed.sizing)
    return Engine(
        model,
        card,
        sized.config,
        blobs=blobs,
        start_token=start_token,
        rehearsed=rehearsed.max_model_len,
        graph_memory=sized.graphs,
    )
