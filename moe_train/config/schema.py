"""Every key of the configuration, its default, unit and bounds: the one place where a default lives.

The YAML files under ``configs/`` state only what differs from these values. The keys of the model have files of their
own: `config.model`, `config.attention` and `config.routing`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moe_train.config.base import Fraction, Strict
from moe_train.config.inference import InferenceConfig
from moe_train.config.model import ModelConfig
from moe_train.config.task import LanguageTask, TaskConfig


class RunConfig(Strict):
    """Identity of a run."""

    name: str = "default"
    """Name of the run; the last part of the run folder."""
    dir: str = "runs/${run.name}"
    """Run folder: configuration, metrics, checkpoints and report of the run."""
    seed: NonNegativeInt = 0
    """Seed of initial values and data order."""
    skip_finished: bool = False
    """Whether a run that has its final evaluation is passed by instead of being evaluated again: a sweep that was
    interrupted goes on where it stopped."""


class TrainSection(Strict):
    """Length, batch and number format of the training."""

    steps: PositiveInt = 400
    """Optimizer steps."""
    global_batch: PositiveInt = 32
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch: PositiveInt | None = None
    """Sequences per rank and forward pass; null: global_batch / ranks, that is no accumulation."""
    precision: Literal["bf16", "fp32", "fp64"] = "fp32"
    """Number format of activations; bf16 keeps fp32 master weights, router and reductions. fp64 is for tests."""
    compile: Literal["none", "pointwise", "block"] = "none"
    """torch.compile. pointwise: norms, rotation, activations and softmax, each by itself; block: the parts of a block
    that have static shapes, and what stands between the experts' products. Needs a C++ compiler on CPU."""
    loss_chunk: PositiveInt | None = None
    """Tokens whose logits exist at one time: the loss is computed in such chunks, forwards and backwards, which saves
    memory and takes more time. null: all at once."""
    clip_norm: PositiveFloat | None = 1.0
    """Gradients are scaled so that their global L2 norm is at most this; null: no clipping."""


SourceName: TypeAlias = Literal[
    "shakespeare", "wikipedia", "imdb", "text", "huggingface", "mix", "tokens", "vader", "rotten_tomatoes"
]


TextWindow: TypeAlias = Literal["first", "random"]
"""Which tokens of a text are read when it is longer than a sequence."""


class SourceConfig(Strict):
    """Where documents come from."""

    source: SourceName = "shakespeare"
    """Name of the source; vader and rotten_tomatoes are for task=sentiment, shakespeare, wikipedia, mix and tokens for
    language models, the others for both."""
    path: str | None = None
    """text: file, folder or glob of .txt and .jsonl, with labels of .csv and .jsonl; huggingface: data set name, or a
    folder, file or glob of parquet, jsonl or csv; tokens: folder, or glob of folders, that moe_train.prepare wrote."""
    name: str | None = None
    """huggingface: configuration name of the data set."""
    split: str = "train"
    """huggingface: split to read."""
    text_field: str = "text"
    """Field of a .jsonl line, .csv line or data set row that holds the text."""
    label_field: str = "label"
    """task=sentiment: field that holds the class, as a word or a number."""


class MixPart(SourceConfig):
    """One component of a mix; its key under data.parts is the domain label of its documents."""

    weight: PositiveFloat = 1.0
    """Share of the mix's bytes, relative to the other parts."""


class DataConfig(SourceConfig):
    """Source, packing and split of the training text."""

    parts: dict[str, MixPart] = Field(default={})
    """mix: the components by domain label."""
    seq_len: PositiveInt = 256
    """Positions per sequence, in tokens; task=sentiment: of a longer text so many tokens are read."""
    window: TextWindow = "first"
    """task=sentiment: which tokens of a longer text training reads. first: those that evaluation always reads; random:
    from a place that is drawn anew in each epoch."""
    heldout_fraction: Fraction = 0.05
    """Share of the documents kept out of training, for evaluation; of labelled texts, of each class."""
    split_seed: NonNegativeInt = 0
    """task=sentiment: which texts are held out."""
    cache_dir: str = "~/.cache/moe_train"
    """Folder of tokenizers and packed token files, keyed by their content."""
    shard_bytes: PositiveInt = 8 * 1024 * 1024
    """Text per token shard, in bytes: the unit of resumable preparation."""


class TokenizerConfig(Strict):
    """How text becomes tokens."""

    kind: Literal["bpe", "file", "bytes"] = "bpe"
    """bpe: byte-level BPE trained on the corpus; file: any tokenizer.json; bytes: the 256 byte values."""
    vocab_size: Annotated[int, Field(ge=258)] = 4096
    """bpe: number of tokens, the boundary token included."""
    lowercase: bool = False
    """bpe: read capitals as small letters, with which few texts teach more of each word; no capital is ever written."""
    prefix_space: bool = False
    """bpe: read a text as if it began with a space, with which its first word is the token that it is elsewhere."""
    path: str | None = None
    """file: path of a tokenizer.json."""
    boundary_token: str | None = None
    """file: name of the token that ends a document; null: the first known of <|endoftext|>, </s>, <eos>, [SEP]."""

    def reading(self) -> tuple[str, ...]:
        """Return the names of the keys by which bpe reads another text than stands there."""
        return tuple(key for key in ("lowercase", "prefix_space") if getattr(self, key))


class LayoutConfig(Strict):
    """How a model lies on the ranks; all ranks are data-parallel."""

    ep: PositiveInt = 1
    """Expert-parallel size: ranks over which one set of experts is sharded; divides ranks and experts."""
    exchange: Literal["auto", "alltoall", "hierarchical", "allgather"] = "auto"
    """How tokens reach experts on other ranks. alltoall: straight to each rank; hierarchical: once to each node, and on
    from there; allgather: every token to every rank of the EP group; auto: by the size of group and nodes."""
    node_size: PositiveInt | None = None
    """Ranks of a node, between which exchange is cheap; null: those that the launcher started on one machine."""
    overlap: PositiveInt = 1
    """Parts into which a micro-batch's tokens are cut, so that one part travels while the experts work on another; 1:
    whole, and only shared experts work while tokens travel."""
    timeout_s: PositiveFloat = 300.0
    """A collective that takes longer ends the run with a roll call, in seconds."""


class ParallelConfig(LayoutConfig):
    """How the ranks share the work of a training."""

    dp_shard: PositiveInt = 1
    """Ranks over which weights, gradients and optimizer state are sharded (FSDP2); divides the ranks. An expert's are
    sharded over as many of the ranks that hold it. 1: every rank has them whole."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """What sums gradients and updates weights."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """deepspeed: 1 shards the optimizer state over the ranks, 2 the gradients too; 0 shards nothing."""
    offload: bool = False
    """Keep state in the host's memory, and update there. deepspeed: the optimizer's; torch: with dp_shard above 1, that
    and the shards of weights and gradients."""
    remat: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them. selective: whatever lies between two
    exchanges, attention's product excepted; full: the whole block, tokens travel again. Neither routes again."""
    placement: Literal["fixed", "auto"] = "fixed"
    """Which experts a rank holds. fixed: a run of consecutive ones; auto: at each checkpoint, those that even out what
    the ranks had to do since the last."""


class OptimConfig(Strict):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    router_lr_ratio: PositiveFloat = 1.0
    """Learning rate of the routers relative to the others. Adam moves every weight by about the learning rate, and the
    many weights of a router in one direction: at first all tokens may follow it to the same experts."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Learning rate at the last step relative to the peak."""
    warmup_steps: NonNegativeInt = 20
    """Steps of linear warm-up."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; vectors (norms, biases) have none."""


class CheckpointConfig(Strict):
    """Saving and resuming."""

    every: NonNegativeInt = 100
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""
    keep: PositiveInt = 2
    """Newest checkpoints kept in the run folder."""
    background: Annotated[bool, Field(alias="async")] = False
    """Write checkpoints beside the training, from a copy in the host's memory; the training waits for the copy only."""
    resume: str = "auto"
    """auto: go on from the newest good checkpoint in run.dir; never: start anew; else the path of a checkpoint."""


class EvalConfig(Strict):
    """Evaluation on the held-out split."""

    every: NonNegativeInt = 100
    """Steps between evaluations; 0: only at the end."""
    batches: PositiveInt | None = 8
    """Global batches per evaluation during training; null: the whole split. The final evaluation takes it all."""


class WandbConfig(Strict):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline."""
    project: str = "moe_train"
    """Project name."""


class LogConfig(Strict):
    """What is shown and recorded."""

    every: PositiveInt = 10
    """Steps between records."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""


class SampleConfig(Strict):
    """How text is generated."""

    max_tokens: PositiveInt = 120
    """Tokens to generate."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0: greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Smallest set of tokens whose probability reaches this is sampled from."""
    seed: NonNegativeInt = 0
    """Seed of the draw: the same seed gives the same text."""


class TrainConfig(Strict):
    """Configuration of ``moe_train.train``."""

    run: RunConfig = RunConfig()
    """Identity of the run."""
    task: TaskConfig = LanguageTask()
    """What is learnt."""
    train: TrainSection = TrainSection()
    """Length, batch and number format."""
    data: DataConfig = DataConfig()
    """Training text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer."""
    model: ModelConfig = ModelConfig()
    """Model."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over ranks."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    log: LogConfig = LogConfig()
    """Records."""
    sample: SampleConfig = SampleConfig()
    """The text sample at the end of a run."""


class RunReference(Strict):
    """An existing run."""

    dir: str
    """Run folder of a finished or running training."""


class EvaluateConfig(Strict):
    """Configuration of ``moe_train.evaluate``."""

    run: RunReference
    """The run to evaluate."""
    text: str | None = None
    """A run of task=sentiment: the text to classify, instead of the held-out ones."""
    eval: EvalConfig = EvalConfig(batches=None)
    """How much of the held-out split; null: all of it."""
    parallel: LayoutConfig = LayoutConfig()
    """Layout over ranks; need not be that of the training."""
    inference: InferenceConfig = InferenceConfig()
    """How the model is run."""
    checkpoint: str = "latest"
    """latest, or the path of a checkpoint."""


class GenerateConfig(Strict):
    """Configuration of ``moe_train.generate``."""

    run: RunReference
    """The run to sample from."""
    prompt: str
    """Text to continue."""
    sample: SampleConfig = SampleConfig()
    """How text is generated."""
    parallel: LayoutConfig = LayoutConfig()
    """Layout over ranks; need not be that of the training."""
    inference: InferenceConfig = InferenceConfig()
    """How the model is run."""
    checkpoint: str = "latest"
    """latest, or the path of a checkpoint."""


class ExportConfig(Strict):
    """Configuration of ``moe_train.export``."""

    run: RunReference
    """The run to export."""
    to: str
    """Folder to write; must not exist or be empty."""
    format: Literal["auto", "huggingface", "moe_train"] = "auto"
    """huggingface: a folder that transformers, vLLM and SGLang load; refused when no public class can express the
    model. moe_train: the project's own names. auto: the first if possible, else the second with the reason."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Number format of the weights; null: that of the training's activations."""
    shard_bytes: PositiveInt = 4_000_000_000
    """Largest size of a safetensors file; one larger tensor gets a file of its own."""
    verify: bool = True
    """Whether to load the folder in transformers, where installed, and compare its logits with the run's."""
    parallel: LayoutConfig = LayoutConfig()
    """Layout over ranks; need not be that of the training."""
    checkpoint: str = "latest"
    """latest, or the path of a checkpoint."""


class StudyReference(Strict):
    """The runs of a study of scaling."""

    dir: str
    """Folder whose folders are the runs, or the points.csv of a report on them."""


class ReportConfig(Strict):
    """Configuration of ``moe_train.report``: of a run, or of a study; exactly one of them."""

    run: RunReference | None = None
    """The run to draw."""
    study: StudyReference | None = None
    """The study to fit a law of scaling to; ``study=DIR`` means ``study.dir=DIR``."""


class PrepareConfig(Strict):
    """Configuration of ``moe_train.prepare``."""

    data: DataConfig = DataConfig()
    """Text to tokenise."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer."""
    output: str | None = None
    """Folder for the token files; null: the cache, where training finds them."""
