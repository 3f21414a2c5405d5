"""What a checkpoint says of pooling: sentence-transformers' modules, a score head, or two tokens that answer yes or no.

A pooling that no file states is refused unless the setting `pooler_config` states it; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from sempre.ipc.config import Convert, PoolerConfig, PoolingKind, PoolingTask, Runner
from sempre.ipc.errors import ConfigError, ModelError
from sempre.ipc.messages import PoolingModel
from sempre.ipc.model_files import MAX_TOKENIZER_BYTES, check_regular, read_json_object, read_json_objects, shown
from sempre.workers.config_fields import ConfigFields
from sempre.workers.models.sentence_files import CONFIG, SentenceFiles, read_sentence_files

Activation = Literal["softmax", "sigmoid", "none"]

MODULES_FILE = "modules.json"
_MAX_LABELS = 1 << 16

# sentence-transformers' names, old and new
_KINDS: dict[str, PoolingKind] = {
    "lasttoken": "LAST",
    "mean_tokens": "MEAN",
    "cls_token": "CLS",
    "mean": "MEAN",
    "cls": "CLS",
}
_FLAG = "pooling_mode_"
_ACTIVATIONS: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "none", "Softmax": "softmax"}
_OF_PROBLEM: dict[str, Activation] = {"regression": "none", "multi_label_classification": "sigmoid"}
# how the names of architectures end
CLASSIFIER, GENERATOR, DECODER = "ForSequenceClassification", "ForCausalLM", "Model"
_ENDINGS = ("Text" + CLASSIFIER, CLASSIFIER, "Text" + DECODER, DECODER)
_FROM_TOKENS = "classifier_from_token"


@dataclass(frozen=True)
class ScoreHead:
    """A linear layer over the pooled row."""

    labels: tuple[str, ...]
    activation: Activation
    tokens: tuple[int, int] | None = None
    """(no, yes): the rows of the vocabulary's head whose difference is the score; None: a layer of its own"""

    @property
    def num_rows(self) -> int:
        return len(self.labels) if self.tokens is None else 2


@dataclass(frozen=True)
class Pooling:
    """What a model computes of a prompt instead of generating."""

    kind: PoolingKind
    use_activation: bool
    """unless a request says otherwise"""
    head: ScoreHead | None
    """None: the pooled row is the result"""
    is_matryoshka: bool
    dimensions: tuple[int, ...]
    files: SentenceFiles = field(default_factory=SentenceFiles, repr=False)
    """what decides on the tokens of a text, and on scores, but not on what is computed of tokens"""

    @property
    def reads_all_rows(self) -> bool:
        return self.kind != "LAST"

    def facts(self, hidden_size: int) -> PoolingModel:
        """What the other processes need to know."""
        return PoolingModel(
            task="embed" if self.head is None else "classify",
            kind=self.kind,
            width=hidden_size if self.head is None else len(self.head.labels),
            use_activation=self.use_activation,
            is_matryoshka=self.is_matryoshka,
            dimensions=list(self.dimensions),
            labels=[] if self.head is None else list(self.head.labels),
            prompts=self.files.prompts,
            default_prompt_name=self.files.default_prompt_name,
            similarity=self.files.similarity,
        )


class PoolingSettings(NamedTuple):
    """The settings that decide whether and how a model pools."""

    runner: Runner = "auto"
    convert: Convert = "auto"
    pooler_config: PoolerConfig | None = None


def decoder_of(architecture: str) -> str:
    """The architecture of the same family that generates: also for a decoder without a head, or with a score head."""
    for ending in _ENDINGS:
        if architecture.endswith(ending):
            return architecture.removesuffix(ending) + GENERATOR
    return architecture


class _Stated(NamedTuple):
    """What sentence-transformers' files say."""

    kind: PoolingKind | None = None
    normalizes: bool = False
    tokens: tuple[int, int] | None = None
    skips_prompts: bool = False
    """whether the tokens of a stored prompt are left out of a mean"""


class _Facts(NamedTuple):
    """The parts of a model that decide how it pools."""

    folder: Path
    fields: ConfigFields
    architecture: str
    hidden_size: int
    vocab_size: int


def read_pooling(
    folder: Path, fields: ConfigFields, sizes: tuple[int, int], settings: PoolingSettings
) -> Pooling | None:
    """How the checkpoint in `folder` pools; None: it generates. `sizes`: its hidden size and vocabulary.

    Raises ModelError naming file and field, ConfigError naming the setting.
    """
    names = fields.raw["architectures"]
    assert isinstance(names, list)
    model = _Facts(folder, fields, names[0], *sizes)
    is_decoder = decoder_of(model.architecture) == model.architecture
    modules = _modules(model)
    if settings.runner == "generate":
        if not is_decoder:
            raise ConfigError(
                f"runner: expected 'auto' or 'pooling' for {model.architecture}, which has no head that generates,"
                " found 'generate'.",
                parameter="runner",
                value="generate",
            )
        _refuse_pooling_settings(settings)
        return None
    task = _task(model, modules, settings)
    if task is None:
        _refuse_pooling_settings(settings)
        return None
    return _classifier(model, modules, settings) if task == "classify" else _embedder(model, modules, settings)


def _refuse_pooling_settings(settings: PoolingSettings) -> None:
    for name in ("convert", "pooler_config"):
        value = getattr(settings, name)
        if value not in ("auto", "none", None):
            raise ConfigError(
                f"{name}: it is for models that pool, and this one generates. Leave it out, or give runner='pooling'.",
                parameter=name,
                value=value,
            )


def _task(model: _Facts, modules: _Stated | None, settings: PoolingSettings) -> PoolingTask | None:
    native: PoolingTask | None = None
    if model.architecture.endswith(CLASSIFIER) or (modules is not None and modules.tokens is not None):
        native = "classify"
    elif modules is not None or decoder_of(model.architecture) != model.architecture:
        native = "embed"
    convert = settings.convert
    if convert in ("embed", "classify"):
        if model.architecture.endswith(CLASSIFIER) and convert == "embed":
            raise ConfigError(
                f"convert: {model.architecture} classifies; expected 'classify' or 'auto', found 'embed'.",
                parameter="convert",
                value=convert,
            )
        return "embed" if convert == "embed" else "classify"
    if native is None and settings.runner == "pooling":
        return "classify" if model.fields.raw.get(_FROM_TOKENS) is not None else "embed"
    return native


def _embedder(model: _Facts, modules: _Stated | None, settings: PoolingSettings) -> Pooling:
    own = settings.pooler_config or PoolerConfig()
    kind = own.pooling_type or (modules.kind if modules is not None else None)
    if kind is None:
        raise ModelError(
            f"{model.folder / MODULES_FILE}: expected a Pooling module, found"
            f" {'none' if modules is not None else 'no such file'}: the model does not state how it pools. Give"
            " pooler_config={'pooling_type': 'LAST'}, 'MEAN' or 'CLS', whichever it was trained with."
        )
    normalizes = True if modules is None else modules.normalizes
    files = read_sentence_files(model.folder)
    if kind == "MEAN" and modules is not None and modules.skips_prompts and any(files.prompts.values()):
        raise ModelError(
            f"{model.folder / CONFIG}: prompts: expected none beside include_prompt=false, which leaves their tokens"
            f" out of the mean, found {shown(files.prompts)}."
        )
    stated = model.fields.raw.get("matryoshka_dimensions")
    dimensions = _dimensions(model, stated) if stated is not None else ()
    return Pooling(
        kind=kind,
        use_activation=normalizes if own.use_activation is None else own.use_activation,
        head=None,
        is_matryoshka=bool(dimensions) or model.fields.boolean("is_matryoshka", default=False),
        dimensions=dimensions,
        files=files,
    )


def _dimensions(model: _Facts, stated: object) -> tuple[int, ...]:
    most = model.hidden_size
    if not isinstance(stated, list) or not all(type(size) is int and 0 < size <= most for size in stated):
        model.fields.fail("matryoshka_dimensions", f"a list of integers in [1, hidden_size={most}]", stated)
    return tuple(stated)


def _classifier(model: _Facts, modules: _Stated | None, settings: PoolingSettings) -> Pooling:
    own = settings.pooler_config or PoolerConfig()
    return Pooling(
        kind=own.pooling_type or "LAST",
        use_activation=True if own.use_activation is None else own.use_activation,
        head=_score_head(model, modules),
        is_matryoshka=False,
        dimensions=(),
    )


def _score_head(model: _Facts, modules: _Stated | None) -> ScoreHead:
    fields = model.fields
    if fields.raw.get(_FROM_TOKENS) is not None:
        return ScoreHead(("LABEL_0",), "sigmoid", _tokens_of_config(model))
    if model.architecture.endswith(CLASSIFIER):
        labels = _labels(fields)
        return ScoreHead(labels, _activation(fields, len(labels)))
    if modules is None or modules.tokens is None:
        fields.fail(_FROM_TOKENS, "the tokens that answer no and yes, as this architecture has no score head", None)
    return ScoreHead(("LABEL_0",), "sigmoid", modules.tokens)


def _labels(fields: ConfigFields) -> tuple[str, ...]:
    named = fields.section("id2label").raw
    count = fields.positive("num_labels", default=len(named) or 2, most=_MAX_LABELS)
    if not named:
        return tuple(f"LABEL_{index}" for index in range(count))
    expected = [str(index) for index in range(count)]
    if sorted(named) != sorted(expected) or not all(isinstance(label, str) for label in named.values()):
        fields.fail("id2label", f"a label for each of 0 … {count - 1}", named)
    return tuple(str(named[index]) for index in expected)


def _activation(fields: ConfigFields, num_labels: int) -> Activation:
    section = fields.section("sentence_transformers")
    for where, name in ((section, "activation_fn"), (fields, "sbert_ce_default_activation_function")):
        if (stated := where.raw.get(name)) is not None:
            found = _ACTIVATIONS.get(str(stated).rpartition(".")[2])
            if found is None:
                where.fail(name, f"one of torch.nn's {', '.join(_ACTIVATIONS)}", stated)
            return found
    problem = fields.raw.get("problem_type")
    if problem not in (None, "single_label_classification", *_OF_PROBLEM):
        fields.fail("problem_type", f"single_label_classification, {' or '.join(_OF_PROBLEM)}", problem)
    return _OF_PROBLEM.get(str(problem), "sigmoid" if num_labels == 1 else "softmax")


def _tokens_of_config(model: _Facts) -> tuple[int, int]:
    """The ids of `classifier_from_token`, [no, yes], of which the score is the difference of logits."""
    fields = model.fields
    texts = fields.raw[_FROM_TOKENS]
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        fields.fail(_FROM_TOKENS, "two tokens, those that answer no and yes", texts)
    if not fields.boolean("is_original_qwen3_reranker", default=False):
        method = fields.raw.get("method")
        if method != "from_2_way_softmax":
            fields.fail("method", "'from_2_way_softmax', or is_original_qwen3_reranker, beside two tokens", method)
    ids = _token_ids(model.folder, texts)
    return _checked_tokens(ConfigFields(dict(zip(texts, ids, strict=True)), "tokenizer.json"), texts, model.vocab_size)


def _token_ids(folder: Path, texts: Sequence[str]) -> list[int]:
    path = folder / "tokenizer.json"
    check_regular(path, MAX_TOKENIZER_BYTES)
    tokenizer = ConfigFields(read_json_object(path, MAX_TOKENIZER_BYTES), "tokenizer.json")
    vocabulary = tokenizer.section("model").section("vocab")
    return [vocabulary.natural(text) for text in texts]


def _checked_tokens(fields: ConfigFields, names: Sequence[str], vocab_size: int) -> tuple[int, int]:
    no, yes = (fields.natural(name) for name in names)
    for name, token_id in zip(names, (no, yes), strict=True):
        if token_id >= vocab_size:
            fields.fail(name, f"a token id less than vocab_size={vocab_size}", token_id)
    return no, yes


def _modules(model: _Facts) -> _Stated | None:
    """What modules.json lists; None without such a file."""
    path = model.folder / MODULES_FILE
    if not path.exists():
        return None
    kind: PoolingKind | None = None
    normalizes, tokens, skips_prompts = False, None, False
    for place, module in enumerate(read_json_objects(path)):
        fields = ConfigFields(module, f"{MODULES_FILE}: [{place}]")
        name = str(fields.raw.get("type")).rpartition(".")[2]
        if place == 0 and name == "Transformer":
            continue
        if place == 1 and name == "Pooling":
            pooling = _config_of(model, fields)
            kind = _kind(pooling, model.hidden_size)
            skips_prompts = not pooling.boolean("include_prompt", default=True)
        elif place == 1 and name == "LogitScore":
            config = _config_of(model, fields)
            tokens = _checked_tokens(config, ("false_token_id", "true_token_id"), model.vocab_size)
        elif place == 2 and name == "Normalize" and kind is not None:
            normalizes = True
        else:
            expected = "Transformer, then Pooling and perhaps Normalize, or LogitScore"
            fields.fail("type", expected, fields.raw.get("type"))
    return _Stated(kind, normalizes, tokens, skips_prompts)


def _config_of(model: _Facts, module: ConfigFields) -> ConfigFields:
    folder = module.raw.get("path")
    if not isinstance(folder, str) or folder in ("", ".", "..") or Path(folder).name != folder:
        module.fail("path", "the name of a folder", folder)
    return ConfigFields(read_json_object(model.folder / folder / "config.json"), f"{folder}/config.json")


def _kind(fields: ConfigFields, hidden_size: int) -> PoolingKind:
    for name in ("word_embedding_dimension", "embedding_dimension"):
        if fields.raw.get(name) is not None and fields.positive(name) != hidden_size:
            fields.fail(name, f"hidden_size={hidden_size}", fields.raw[name])
    stated = fields.raw.get("pooling_mode")
    if stated is not None:
        if not isinstance(stated, str) or stated not in _KINDS:
            fields.fail("pooling_mode", "'lasttoken', 'mean' or 'cls'", stated)
        return _KINDS[stated]
    chosen = [name for name in fields.raw if name.startswith(_FLAG) and fields.boolean(name, default=False)]
    if len(chosen) != 1 or chosen[0].removeprefix(_FLAG) not in _KINDS:
        expected = "one of " + ", ".join(f"{_FLAG}{name}" for name in list(_KINDS)[:3]) + " to be true"
        _fail_together(fields, expected, chosen)
    return _KINDS[chosen[0].removeprefix(_FLAG)]


def _fail_together(fields: ConfigFields, expected: str, chosen: list[str]) -> NoReturn:
    raise ModelError(f"{fields.source}: pooling_mode: expected {expected}, found {shown(chosen)}.")
