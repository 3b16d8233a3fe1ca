"""One model for one caller: what a Hugging Face model offers, computed by our blocks.

`forward` and `generate` return what transformers returns; `stream` and `generate_many` run on the continuous-batching
engine that serves the pool. All of them share one copy of the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn

from headrace.errors import ConfigError, InvalidRequestError
from headrace.kernels.kv import KVCache
from headrace.kernels.policies import POLICIES
from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.config import InferenceConfig
from headrace.workers.inference.inputs import check_cache, check_ids, refuse
from headrace.workers.inference.padded import PaddedModel
from headrace.workers.inference.report import InferenceReport, make_report
from headrace.workers.inference.shell import CACHE_NAME, Shell, output
from headrace.workers.inference.sources import Loaded
from headrace.workers.memory import available_bytes

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from headrace.kernels.model import Model
    from headrace.workers.inference.streams import Streams, TextStream, TokenStream

__all__ = ["InferenceEngine", "supported_models"]

_DECODERS = ("ForCausalLM", "LMHeadModel")


def supported_models() -> dict[str, tuple[str, ...]]:
    """The families that `init_inference` takes, and the Hugging Face classes of each."""
    decoders = {
        policy.family: tuple(name for name in policy.architectures if name.endswith(_DECODERS)) for policy in POLICIES
    }
    return {family: names for family, names in decoders.items() if names}


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
        padded = PaddedModel(loaded.model, max_tokens=self.max_tokens)
        self.device, self.dtype = padded.device, padded.dtype
        _check_memory(padded, settings.min_tokens)
        self._loaded: Loaded | None = loaded
        self._shell: Shell | None = Shell(loaded.config, loaded.generation_config, padded)
        self._streams: Streams | None = None
        self._starting = threading.Lock()

    def __repr__(self) -> str:
        if self._loaded is None:
            return "InferenceEngine(destroyed)"
        return f"InferenceEngine({self._loaded.architecture}, {self.dtype}, {self.device})\n{self.module}"

    # -------------------------------------------------------------------------------------------------------- the model

    @property
    def module(self) -> Model:
        """The injected model; print it to see its blocks."""
        return self._alive().model

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of `generate`; may be changed."""
        return self._living_shell().generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._living_shell().generation_config = value

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights."""
        return self.module.parameters()

    def eval(self) -> InferenceEngine:
        """An engine only ever infers; this is for code that says so anyway."""
        return self

    def can_generate(self) -> bool:
        """It can; transformers' pipelines ask."""
        return True

    def report(self) -> InferenceReport:
        """What was injected, in which precision, how much memory it takes, and what was left alone."""
        return make_report(self._alive(), max_tokens=self.max_tokens)

    def new_cache(self) -> PagedCache:
        """An empty cache, to be passed as `past_key_values` to calls that continue each other."""
        return self._living_shell().padded.new_cache()

    def destroy(self) -> None:
        """Free the memory of weights and caches; the engine cannot be used afterwards."""
        with self._starting:
            if self._streams is not None:
                self._streams.close()
            self._streams = self._shell = self._loaded = None

    # ------------------------------------------------------------------------------------------- as transformers does

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedCache | None = None,
        *,
        cache: PagedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits of a padded batch, as transformers' CausalLMOutputWithPast.

        Padding is not computed: its logits are zero, on whichever side of the text it is.

        Args:
            input_ids: [B, T].
            attention_mask: [B, tokens in the cache + T], 1 for a token and 0 for padding; None for no padding.
            position_ids: those that follow from the mask; there is no need to give them.
            past_key_values: the cache of an earlier call, which this one continues and adds to.
            cache: likewise, as newer transformers calls it.
            use_cache: whether to return a cache; None asks the model's config.
            logits_to_keep: compute the logits of so many last columns only, or of those named; 0 for all.
            return_dict: False for a tuple.
            others: other arguments of transformers' forward, which are refused unless they are None or False.

        Raises:
            InvalidRequestError: an argument is wrong or cannot be honoured.
            ContextLengthError: a text gets longer than `max_tokens`.
        """
        padded = self._living_shell().padded
        refuse(others)
        ids = check_ids(input_ids, padded.model.spec.vocab_size)
        given = past_key_values if cache is None else cache
        held = padded.new_cache() if given is None else check_cache(given)
        logits = padded.logits(ids, attention_mask, position_ids, held, logits_to_keep)
        wanted = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        result = output(logits, held if wanted or given is not None else None)
        return result.to_tuple() if return_dict is False else result

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
        """
        shell = self._living_shell()
        if "input_ids" in kwargs:
            if inputs is not None:
                raise InvalidRequestError("The prompt is given twice, as inputs and as input_ids.", param="input_ids")
            inputs = kwargs.pop("input_ids")
        for name in ("past_key_values", "cache"):
            if name in kwargs:
                kwargs[CACHE_NAME] = kwargs.pop(name)
        if inputs is not None:
            inputs = check_ids(inputs, shell.padded.model.spec.vocab_size).to(self.device)
            if kwargs.get(CACHE_NAME) is None:
                shell.padded.check_prompt(inputs, attention_mask, kwargs.pop("position_ids", None))
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask.to(self.device)
        if isinstance(assistant := kwargs.get("assistant_model"), InferenceEngine):
            kwargs["assistant_model"] = assistant._living_shell()
        return shell.generate(inputs, **kwargs)

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
        """
        from headrace.workers.inference.streams import TextStream

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

    def _alive(self) -> Loaded:
        if self._loaded is None:
            raise ConfigError("The engine was destroyed; make another one with init_inference.")
        return self._loaded

    def _living_shell(self) -> Shell:
        self._alive()
        assert self._shell is not None
        return self._shell

    def _open_streams(self) -> Streams:
        """The continuous-batching engine, started when first needed: it takes memory for its cache."""
        from headrace.workers.inference.streams import Streams, start_engine

        loaded = self._alive()
        with self._starting:
            if self._streams is None:
                self._streams = Streams(start_engine(loaded, self.generation_config, self.max_tokens))
            return self._streams

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            folder = self._alive().folder
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


def _check_memory(padded: PaddedModel, tokens: int) -> None:
    """Refuse a model beside which there is no memory for a text of so many tokens."""
    if tokens > padded.max_tokens:
        raise ConfigError(
            f"min_tokens is {tokens}, but the model was made for {padded.max_tokens}; lower it.", param="min_tokens"
        )
    needed = KVCache.bytes_per_block(padded.model.spec, tokens, padded.dtype)
    free = torch.cuda.mem_get_info(padded.device)[0] if padded.device.type == "cuda" else available_bytes()
    if needed > free:
        raise ConfigError(
            f"{tokens} tokens (min_tokens) need {needed:,} bytes of cache, but {free:,} are free on {padded.device}; "
            "lower min_tokens, or use a narrower dtype or a smaller model.",
            param="min_tokens",
        )


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
