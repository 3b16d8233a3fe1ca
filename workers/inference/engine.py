"""One model for one caller: what a Hugging Face model offers, computed by our blocks.

`forward` and `generate` return what transformers returns; `stream` and `generate_many` run on the continuous-batching
engine that serves the pool. All of them share one copy of the weights. What differs between decoders, encoders and
encoder-decoders is in a class for each kind.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn

from headrace.errors import ConfigError, InvalidRequestError, UnsupportedModelError
from headrace.kernels.policies import POLICIES
from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.config import InferenceConfig
from headrace.workers.inference.decoder import Decoder
from headrace.workers.inference.encoder import Encoder
from headrace.workers.inference.encoder_decoder import EncoderDecoder
from headrace.workers.inference.kind import GeneratingKind, Kind
from headrace.workers.inference.memory import check_cache
from headrace.workers.inference.report import InferenceReport, make_report
from headrace.workers.inference.shell import CACHE_NAME
from headrace.workers.inference.sources import Loaded

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from headrace.workers.inference.streams import Streams, TextStream, TokenStream

__all__ = ["InferenceEngine", "supported_models"]


def supported_models() -> dict[str, tuple[str, ...]]:
    """The families that `init_inference` takes, and the Hugging Face classes of each."""
    return {policy.family: policy.classes for policy in POLICIES}


class InferenceEngine:
    """A model whose layers are ours, used like the Hugging Face model that it was; made by `headrace.init_inference`.

    Attributes:
        supported_models: families that can be injected, and their Hugging Face classes.
        settings: what it was made with.
        config: of the model, as transformers has it.
        device: where the model is.
        dtype: of its weights.
        max_tokens: most tokens of one text, prompt and output together.
        tokenizer: of the model's folder, for `stream` and `generate_many` with text; may be set.
    """

    supported_models: ClassVar[dict[str, tuple[str, ...]]] = supported_models()

    def __init__(self, loaded: Loaded, settings: InferenceConfig) -> None:
        self.settings = settings
        self.config = loaded.config
        self.max_tokens = settings.max_tokens or loaded.model.spec.max_positions
        self.tokenizer: Any = None
        if settings.max_tokens is not None:
            loaded.model.reserve_positions(settings.max_tokens)
        kind = _kind(loaded, self.max_tokens, settings.cuda_graphs)
        self.device, self.dtype = kind.device, kind.dtype
        check_cache(kind, settings.min_tokens)
        self._kind: Kind | None = kind
        self._streams: Streams | None = None
        self._starting = threading.Lock()

    def __repr__(self) -> str:
        if self._kind is None:
            return "InferenceEngine(destroyed)"
        return f"InferenceEngine({self._kind.loaded.architecture}, {self.dtype}, {self.device})\n{self.module}"

    # -------------------------------------------------------------------------------------------------------- the model

    @property
    def module(self) -> nn.Module:
        """The injected model; print it to see its blocks."""
        return self._alive().module

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of `generate`; may be changed."""
        return self._generating().shell.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._generating().shell.generation_config = value

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights."""
        return self.module.parameters()

    def eval(self) -> InferenceEngine:
        """An engine only ever infers; this is for code that says so anyway."""
        return self

    def can_generate(self) -> bool:
        """Whether it writes, as decoders and encoder-decoders do; transformers' pipelines ask."""
        return isinstance(self._alive(), GeneratingKind)

    def report(self) -> InferenceReport:
        """What was injected, in which precision, how much memory it takes, what was left alone; and whether calls took
        CUDA graphs, and if not, why."""
        return make_report(self._alive(), self._streams)

    def new_cache(self) -> PagedCache:
        """An empty cache, to be passed as `past_key_values` to calls that continue each other."""
        return self._generating().new_cache()

    def destroy(self) -> None:
        """Free the memory of weights and caches; the engine cannot be used afterwards."""
        with self._starting:
            if self._streams is not None:
                self._streams.close()
            if self._kind is not None:
                self._kind.close()
            self._streams = self._kind = None

    # ------------------------------------------------------------------------------------------- as transformers does

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's class in transformers returns for the same arguments: logits, states, or what a task gives.

        Padding is not computed: what stands for it is zero, on whichever side of the text it is.

        Args:
            args: as for the model's class, in the same order.
            kwargs: likewise.

                input_ids: [B, T].
                attention_mask: [B, tokens in the cache + T], 1 for a token and 0 for padding; None for no padding.
                position_ids: those that follow from the mask; there is no need to give them.
                token_type_ids: [B, T], the segment of each token, for encoders.
                decoder_input_ids: [B, U], what an encoder-decoder has written, from its start token on.
                decoder_attention_mask: [B, tokens in the cache + U].
                encoder_outputs: what the encoder made of the source, if it was computed already.
                past_key_values: the cache of an earlier call, which this one continues and adds to; also by the name
                    cache.
                use_cache: whether to return a cache; None asks the model's config.
                logits_to_keep: compute the logits of so many last columns only, or of those named; 0 for all.
                return_dict: False for a tuple.

                Others are refused unless they are None or False; those of a task's head go to it.

        Raises:
            InvalidRequestError: an argument is wrong or cannot be honoured.
            ContextLengthError: a text gets longer than `max_tokens`.
        """
        kind = self._alive()
        kind.look()
        return kind.forward(*args, **kwargs)

    def generate(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """What `model.generate` of transformers returns for the same arguments, by transformers' own loop.

        Args:
            inputs: token ids [B, T], also by the name input_ids.
            attention_mask: [B, T], 1 for a token and 0 for padding. Padding on the right is understood as well: a
                text goes on behind its last token.
            kwargs: all that transformers' generate takes, such as max_new_tokens, do_sample, num_beams,
                stop_strings with tokenizer, streamer, logits_processor, assistant_model.

        Raises:
            InvalidRequestError: an argument is wrong or cannot be honoured.
            ContextLengthError: prompt and output would get longer than `max_tokens`.
            UnsupportedModelError: the model is an encoder.
        """
        kind = self._generating()
        kind.look()
        if "input_ids" in kwargs:
            if inputs is not None:
                raise InvalidRequestError("The prompt is given twice, as inputs and as input_ids.", param="input_ids")
            inputs = kwargs.pop("input_ids")
        for name in ("past_key_values", "cache"):
            if name in kwargs:
                kwargs[CACHE_NAME] = kwargs.pop(name)
        if isinstance(assistant := kwargs.get("assistant_model"), InferenceEngine):
            kwargs["assistant_model"] = assistant._generating().shell
        return kind.generate(inputs, attention_mask, kwargs)

    # ----------------------------------------------------------------------------------- many texts, each at its pace

    @overload
    def stream(self, prompt: str, **sampling: Any) -> TextStream: ...
    @overload
    def stream(self, prompt: Sequence[int] | Tensor, **sampling: Any) -> TokenStream: ...
    def stream(self, prompt: str | Sequence[int] | Tensor, **sampling: Any) -> TextStream | TokenStream:
        """Generate token by token: an iterator of text for a text, of token ids for token ids.

        Streams that are open at the same time are computed together. The token that ends a text is not given out.

        Args:
            prompt: text, or token ids [T] or [1, T].
            sampling: fields of `headrace.SamplingParams`, such as max_tokens, temperature, top_p, seed.

        Raises:
            RequestError: it cannot be served as asked.
            UnsupportedModelError: the model is an encoder.
        """
        from headrace.workers.inference.streams import TextStream

        self._generating().look()
        if not isinstance(prompt, str):
            return self._open_streams().open(_ids(prompt), sampling)
        tokenizer = self._need_tokenizer()
        return TextStream(self._open_streams().open(tokenizer(prompt).input_ids, sampling), tokenizer)

    @overload
    def generate_many(self, prompts: Iterable[str], **sampling: Any) -> list[str]: ...
    @overload
    def generate_many(self, prompts: Iterable[Sequence[int] | Tensor], **sampling: Any) -> list[list[int]]: ...
    def generate_many(self, prompts: Iterable[Any], **sampling: Any) -> list[Any]:
        """What follows each prompt, computed together without padding; arguments as in `stream`."""
        from headrace.workers.inference.streams import TextStream

        streams = [self.stream(prompt, **sampling) for prompt in prompts]
        return ["".join(one) if isinstance(one, TextStream) else list(one) for one in streams]

    # -------------------------------------------------------------------------------------------------------- details

    def _alive(self) -> Kind:
        if self._kind is None:
            raise ConfigError("The engine was destroyed; make another one with init_inference.")
        return self._kind

    def _generating(self) -> GeneratingKind:
        kind = self._alive()
        if not isinstance(kind, GeneratingKind):
            raise UnsupportedModelError(
                f"The {kind.loaded.architecture} is an encoder: it reads texts and writes none. Call the engine "
                "itself, engine(input_ids, attention_mask), for what it makes of a text; to generate, use a model that "
                "does, such as a LlamaForCausalLM.",
                param="model",
            )
        return kind

    def _open_streams(self) -> Streams:
        """The continuous-batching engine, started when first needed: it takes memory for its cache."""
        from headrace.workers.inference.streams import Streams

        kind = self._generating()
        with self._starting:
            if self._streams is None:
                self._streams = Streams(kind.start_engine(), kind.stream_road)
            return self._streams

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            folder = self._alive().loaded.folder
            if folder is None:
                raise ConfigError(
                    "The engine was made of a module, which has no tokenizer; set engine.tokenizer, or give token ids.",
                    param="prompt",
                )
            from transformers import AutoTokenizer

            try:
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except Exception as error:  # transformers raises many types
                raise ConfigError(
                    f"No tokenizer can be made of the files in {str(folder)!r} ({type(error).__name__}); set "
                    "engine.tokenizer, or give token ids.",
                    param="prompt",
                ) from error
        return self.tokenizer


def _kind(loaded: Loaded, max_tokens: int, cuda_graphs: bool | None) -> Kind:
    spec = loaded.model.spec
    if spec.is_encoder:
        return Encoder(loaded, max_tokens, cuda_graphs)
    return (Decoder if spec.encoder is None else EncoderDecoder)(loaded, max_tokens, cuda_graphs)


def _ids(prompt: Sequence[int] | Tensor) -> Sequence[int]:
    if not isinstance(prompt, Tensor):
        return prompt
    if prompt.ndim == 2 and len(prompt) == 1:
        prompt = prompt[0]
    if prompt.ndim != 1:
        raise InvalidRequestError(
            f"The prompt has shape {list(prompt.shape)}; a stream is one text, so give [tokens]; open several streams.",
            param="prompt",
        )
    ids: list[int] = prompt.tolist()
    return ids
