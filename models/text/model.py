"""Loading a model with what surrounds it: its tokenizer, its chat template, and sessions that generate text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike

from tensorgraph.compiler import CompileOptions, PlanCache
from tensorgraph.device import Device, get_devices
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.engine import Engine
from tensorgraph.errors import CannotTrim, InputError, UnsupportedError
from tensorgraph.extents import Extents
from tensorgraph.models.architecture import Model, model_from_checkpoint, model_from_gguf
from tensorgraph.models.text.generation import Generation
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.packaged import find_model
from tensorgraph.models.text.sampling import Sampler
from tensorgraph.models.text.tokenizer import Tokenizer
from tensorgraph.plan import Plan
from tensorgraph.session import Session
from tensorgraph.state import StateSpec
from tensorgraph.state_store import StateStore

if TYPE_CHECKING:
    from tensorgraph.models.text.chat import ChatTemplate
    from tensorgraph.models.text.checkpoint import Checkpoint
    from tensorgraph.models.text.embedding import Pooling, Text
    from tensorgraph.models.text.offload import GpuLayers

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
Rows = Callable[[str, StateSpec, int], ArrayLike]
"""`rows(stream, spec, n)`: n rows of a stream."""


def load(
    path: str | Path,
    *,
    backend: str | Device | Sequence[str | Device] = "cpu",
    kv_type: DType | str = "f16",
    options: CompileOptions | None = None,
    threads: int | Literal["auto"] | None = None,
    packed_cache: bool | str | Path = False,
    gpu_layers: GpuLayers | None = None,
    cpu_experts: bool = False,
    context: int | None = None,
    step_tokens: int = 512,
) -> TextModel:
    """Open a model: a GGUF file (of a split one, any part), a folder as published on a model hub (config.json, safetensors,
    tokenizer.json or tokenizer.model), or the name of one in installed packages (`packaged.PACKAGED`: `smollm2`, `minilm`,
    `gemma3-270m`).

    `kv_type` is the type of the rows that sessions keep: f16, bf16, f32 or q8_0. `threads` is how many the devices compute with;
    they keep what they have where None.

    With `packed_cache`, weights that devices repack are kept on disk in that form, once the model is closed, and mapped by later
    starts: in the user's cache folder (`~/.cache/tensorgraph/packed`), or in a folder of that name. GGUF files only. What is kept
    takes about as much room as the file; whoever wants it back removes the folder.

    Of two devices, such as "cuda,cpu", the first has the last `gpu_layers` layers: as many as it has room for where None or
    "auto", beside the state of `context` tokens (4096 where None) and steps of `step_tokens`. With `cpu_experts`, the second has
    the weights of experts.

    Raises:
        InputError: there is no such file, no such number of threads or layers, or packed weights are wanted of a folder.
        FormatError: it is damaged. UnknownNameError: its architecture or a backend is not there.
    """
    devices = get_devices(backend)
    if threads is not None:
        if threads != "auto" and (not isinstance(threads, int) or threads < 1):
            raise InputError(f'[load] wanted threads as a number from 1 on, or "auto"; got {threads!r}')
        for device in devices:
            device.set_threads(threads)
    model = open_model(path)
    try:
        cache = devices[0].plan_cache() if hasattr(devices[0], "plan_cache") else None
        two = len(devices) == 2 and hasattr(devices[0], "free_bytes") and not model.encodes
        if gpu_layers is not None or cpu_experts or two:
            from tensorgraph.models.text.offload import Parts, place

            cache, taken = cache or PlanCache(), options or CompileOptions()
            parts = Parts("auto" if gpu_layers is None else gpu_layers, cpu_experts, context or 4096, step_tokens)
            options = place(model, devices, taken, as_dtype(kv_type), cache, parts)
        loaded = TextModel(model, Engine(model, devices, kv_dtype=kv_type, options=options, cache=cache))
        if packed_cache:
            loaded.keep_packed(None if packed_cache is True else Path(packed_cache))
        return loaded
    except BaseException:
        if model.file is not None:
            model.file.close()
        raise


def open_model(path: str | Path) -> Model:
    """The model in a file or folder, without devices, tokenizer or template.

    Raises: as `load`.
    """
    place = find_model(path)
    if place.is_dir():
        from tensorgraph.models.text.checkpoint import Checkpoint  # which imports safetensors

        file: GGUF | Checkpoint = Checkpoint.open(place)
    else:
        file = GGUF.open(place)
    try:
        return model_from_gguf(file) if isinstance(file, GGUF) else model_from_checkpoint(file)
    except BaseException:
        file.close()
        raise


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer alone, of a file, or of a folder whether or not it holds weights.

    Raises: InputError, FormatError, UnsupportedError, UnknownNameError as `Tokenizer.from_gguf` and `from_folder` do.
    """
    place = find_model(path)
    if place.is_dir():
        return Tokenizer.from_folder(place)
    with GGUF.open(place) as file:
        return Tokenizer.from_gguf(file.metadata)


class TextModel:
    """A model on its devices, with its tokenizer and chat template; both are built when they are first asked for.

    Attributes:
        model: architecture, configuration and weights.
        engine: its plans and counters, which all sessions share.
    """

    def __init__(self, model: Model, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self._keep: list[Callable[[], None]] = []

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises: InputError, FormatError, UnsupportedError, UnknownNameError as `Tokenizer.from_gguf` and `from_folder` do."""
        file = self._file
        if isinstance(file, GGUF):
            return Tokenizer.from_gguf(file.metadata)
        return Tokenizer.from_folder(file.folder)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Raises: FormatError where the file has none."""
        from tensorgraph.models.text.chat import ChatTemplate  # jinja2 takes as long to import as all of this package

        file = self._file
        return ChatTemplate.from_gguf(file.metadata) if isinstance(file, GGUF) else ChatTemplate.from_folder(file.folder)

    @property
    def _file(self) -> GGUF | Checkpoint:
        assert self.model.file is not None
        return self.model.file  # type: ignore[return-value]  # weights of other kinds have no text around them

    @cached_property
    def pooling(self) -> Pooling:
        """How its files say that the vectors of texts are made of those of tokens; the mean where they do not say it."""
        from tensorgraph.models.text.embedding import declared_pooling

        return declared_pooling(self._file)

    def session(self, *, context: int | None = None, step_tokens: int = 512) -> TextSession:
        """A new sequence of at most `context` tokens, the model's own limit where None; see `Session`.

        Raises: UnsupportedError: the model is an encoder.
        """
        if self.model.encodes:
            encoder = f"{self.model.architecture.name} is an encoder"
            raise UnsupportedError(f"[session] {encoder}: it generates no text and gives no logits; it is there for `embed`")
        return TextSession(self, context=context, step_tokens=step_tokens)

    def embed(
        self,
        texts: Sequence[Text],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        batch: int = 512,
        truncate: bool = False,
    ) -> np.ndarray:
        """A vector for each text, made of the hidden states of its tokens after the last norm.

        Args:
            texts: texts, or the ids of their tokens.
            pooling: the `mean` of a text's tokens, the first (`cls`) or the `last`; as the model's files say where None.
            normalize: to length 1.
            batch: tokens of several texts that are evaluated in one step; no text sees another.
            truncate: cut texts that are longer than the model's positions.

        Shapes: -> f32 [N, D].
        Raises: InputError: a text is empty or too long, or pooling is `none`. UnsupportedError: the files ask for more.
        """
        from tensorgraph.models.text.embedding import as_pooling, embed, encode, hidden_states

        chosen = self.pooling if pooling is None else as_pooling(pooling)
        if chosen == "none":
            raise InputError("[embed] wanted pooling mean, cls or last; with none, `embed_tokens` gives a vector for each token")
        rows = hidden_states(self, encode(self, texts, truncate=truncate), batch=batch)
        vectors = list(embed(rows, chosen, normalize=normalize))
        return np.stack(vectors) if vectors else np.empty((0, self.model.config.hidden_size), np.float32)

    def embed_tokens(
        self, texts: Sequence[Text], *, normalize: bool = False, batch: int = 512, truncate: bool = False
    ) -> list[np.ndarray]:
        """A vector for each token of each text; see `embed`. Shapes: -> N x f32 [n, D]."""
        from tensorgraph.models.text.embedding import embed, encode, hidden_states

        rows = hidden_states(self, encode(self, texts, truncate=truncate), batch=batch)
        return list(embed(rows, "none", normalize=normalize))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the model's answer begins."""
        ids = self.tokenizer.encode(self.chat_template.render(messages), parse_special=True)
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_id  # templates may write BOS themselves
        return ids[1:] if doubled else ids

    def keep_packed(self, folder: Path | None) -> None:
        """What `packed_cache` of `load` says, of the devices that repack weights.

        Raises: InputError: the model is not a GGUF file.
        """
        if not isinstance(self._file, GGUF):
            raise InputError(f"[load] wanted a GGUF file whose weights are kept packed; got the folder {self._file.folder}")
        for device in self.engine.devices:
            keep: Callable[..., Callable[[], None]] | None = getattr(device, "keep_packed", None)
            self._keep += [keep(*file, folder) for file in self._file.mapped] if keep is not None else []

    def close(self) -> None:
        """Let go of the file, when packed weights are on disk if they are to be kept there."""
        for keep in self._keep:
            keep()
        self._let_go()

    def _let_go(self) -> None:
        self._keep.clear()
        if self.model.file is not None:
            self.model.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close() if kind is None else self._let_go()


class TextSession(Session):
    """A session that takes text and generates it."""

    def __init__(
        self,
        model: TextModel,
        *,
        context: int | None = None,
        step_tokens: int = 512,
        store: StateStore | None = None,
        seq: int | None = None,
        ids: Iterable[int] = (),
    ) -> None:
        super().__init__(model.engine, context=context, step_tokens=step_tokens, store=store, seq=seq, ids=ids)
        self.model = model

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampler: Sampler | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Continue a prompt; iterating over the result gives the text as it comes, and runs the model.

        A text or ids go on after what the session holds. Messages (`{"role": ..., "content": ...}`) are the whole
        conversation, put into the model's chat template: the session keeps what it shares with them and forgets the rest.
        It ends at a token that ends a turn, at one of the texts `stop` (which is not given out), after `max_tokens`, or when
        the context is full. `sampler` is greedy where None. Ctrl-C takes effect after a step and leaves the session usable.

        Raises:
            InputError: the prompt is empty, has an id outside the vocabulary, or is longer than the context holds; the
            session is unchanged.
        """
        if isinstance(prompt, bytes | Mapping):
            raise InputError(f"[generate] wanted a text, token ids, or a list of messages; got {type(prompt).__name__}")
        if "tokenizer" not in vars(self.model):  # while it is built, the device puts weights into their layout
            self.engine.executable(self.extents())
        if isinstance(prompt, str):
            ids = self.model.tokenizer.encode(prompt, add_special=not self.length)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self._rewind(self.model.encode_chat(prompt))  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        if not ids:
            raise InputError("[generate] wanted a prompt of at least one token; got an empty one")
        self._check(ids)
        tokenizer, sampler = self.model.tokenizer, sampler or Sampler()
        return Generation(self, tokenizer, ids, max_tokens=max_tokens, sampler=sampler, stop=stop)

    def fill(self, ids: Sequence[int], rows: Rows) -> None:
        """Append tokens whose state is given, not computed: `rows(stream, spec, n)` gives the rows [n, *spec.row_shape] that they
        complete of each stream.

        Raises: InputError: as `eval`. ShapeError: other rows than these. The session is unchanged.
        """
        given = self._check(ids)
        with self.engine.lock:
            with self._store.begin([(self._open(), len(given))]) as step:
                for name, spec in self._store.specs.items():
                    step.append(name, rows(name, spec, len(step.classes[spec.stream_class].new)))
                self._ids[self.length :] = given.tolist()
                step.commit()

    @property
    def plan(self) -> Plan:
        """The plan of its steps, compiled if no step was made."""
        return self.engine.executable(Extents(self.step_tokens, self.context)).plan

    @property
    def state_bytes(self) -> int:
        """Bytes of the pages that hold its state and that of the sessions it shares a store with."""
        return self._store.size_bytes

    def _rewind(self, ids: list[int]) -> list[int]:
        """Go back to what the session shares with the beginning of `ids`; those that are left to evaluate, one at least."""
        if len(ids) > self.context:
            raise InputError(f"[generate] the context holds {self.context} tokens; the conversation has {len(ids)}")
        shared = 0
        while shared < min(self.length, len(ids) - 1) and self.ids[shared] == ids[shared]:
            shared += 1
        try:
            self.trim(shared)
        except CannotTrim:
            self.trim(0)
        return ids[self.length :]

    def _another(self, seq: int, ids: Iterable[int]) -> Self:
        return type(self)(self.model, context=self.context, step_tokens=self.step_tokens, store=self._store, seq=seq, ids=ids)
