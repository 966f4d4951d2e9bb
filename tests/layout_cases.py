"""The cases of the layout contract: every router, balance loss and capacity rule, each with several of the others;
every kind of attention, of feed-forward network and of prediction ahead, as published models combine them; and experts
that a graph couples."""

from layouts import Case

OFF = ("balance.aux=null", "balance.z_loss=null")
EIGHT = ("model.ffn.num_experts=8", "model.layers=1")
TOP_1 = ("model.ffn.top_k=1",)
ONE = ("model.layers=1",)
V2 = ("router.scores=softmax", "router.group_score=max", "router.normalize=none")
SEEN_BY_ROUTER = ("router.jitter=0.2", "router.expert_dropout=0.2")


def router(kind: str, *keys: str) -> tuple[str, ...]:
    return (f"router.kind={kind}", *(f"router.{key}" for key in keys))


def factor(value: float, *keys: str) -> tuple[str, ...]:
    return ("capacity.kind=factor", f"capacity.factor={value}", *(f"capacity.{key}" for key in keys))


def device(value: float, *keys: str) -> tuple[str, ...]:
    return ("capacity.kind=device", f"capacity.factor={value}", *(f"capacity.{key}" for key in keys))


def loss(name: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"balance.{name}.{key}" for key in keys)


def attention(*keys: str) -> tuple[str, ...]:
    return tuple(f"model.attention.{key}" for key in keys)


def ffn(*keys: str) -> tuple[str, ...]:
    return tuple(f"model.ffn.{key}" for key in keys)


def ahead(depth: int, *keys: str) -> tuple[str, ...]:
    return (f"model.mtp.depth={depth}", *(f"model.mtp.{key}" for key in keys))


PRESETS = {"ffn": "graph_tiny", "block": "graph_block_tiny"}


def graph(expert: str, *keys: str) -> tuple[str, ...]:
    """The presets set nothing that has no meaning where nothing is routed."""
    return (f"model={PRESETS[expert]}", *(f"model.ffn.graph.{key}" for key in keys))


MLA = attention("kind=mla", "kv_rank=5", "nope_dim=4", "rope_dim=8", "v_dim=3", "rope_theta=100.0")
YARN = attention("yarn.factor=4.0", "yarn.original_length=64", "yarn.beta_fast=4.0", "yarn.mscale=0.7")
"""Of four frequencies one stays, one is divided, and the others are blended."""

PLAIN = [
    Case("top-2, global balance"),
    Case("top_k = num_experts, weights scaled", ("model.ffn.top_k=4", "router.scale=2.5")),
    Case("all tokens to the first experts", zero_router=True),
    Case("all tokens to one expert", (*router("topk", "normalize=none"), *TOP_1), zero_router=True),
    Case("uneven valid tokens per rank and micro-batch", padding="uneven"),
    Case("ranks with zero valid tokens", zero_router=True, padding="whole ranks"),
    Case("all tokens to one expert for good, ranks without valid tokens",
         (*router("topk", "normalize=none"), *TOP_1, "balance.loss_free.rate=0.001"), start_bias=50.0,
         padding="whole ranks"),
    Case("balance within each sequence", loss("aux", "scope=sequence"), padding="uneven"),
    Case("capacity per sequence", factor(0.8), padding="uneven"),
    Case("MoE every other layer, shared expert, untied head",
         ("model.ffn.every=2", "model.ffn.num_shared_experts=1", "model.tie_embeddings=false")),
    Case("equal counts on all ranks, aux over the step", loss("aux", "scope=global"), text="one sequence"),
    Case("equal counts on all ranks, aux over the micro-batch", loss("aux", "scope=micro"), text="one sequence"),
]  # fmt: skip

NO_LOSS = [
    Case("topk, unnormalised, no loss", (*router("topk", "normalize=none"), *SEEN_BY_ROUTER, *OFF)),
    Case("topk_softmax, no loss, position",
         (*router("topk_softmax", "expert_dropout=0.3"), *factor(0.9, "minimum=2"), *OFF), padding="uneven"),
    Case("sigmoid, no loss, global probability",
         (*router("sigmoid", "scale=2.5"), *factor(1.0, "scope=global", "policy=probability"), *OFF)),
    Case("noisy_topk, no loss, reroute", (*router("noisy_topk", "jitter=0.1"), *factor(0.8, "reroute=true"), *OFF)),
    Case("switch, no loss, random", (*router("switch", "jitter=0.3"), *TOP_1, *factor(1.0, "policy=random"), *OFF)),
    Case("gshard, no loss, choice order, renormalised after",
         (*router("gshard"), *factor(0.8, "order=choice", "renormalize=after"), *OFF), padding="uneven"),
    Case("group_limited after V2, no loss, device budget",
         (*EIGHT, *router("group_limited", "top_groups=3"), *V2, "model.ffn.top_k=3", "router.scale=16.0",
          *device(0.9, "exempt_fraction=0.4"), *OFF)),
    Case("expert_choice, no loss",
         (*router("expert_choice", "allow_future_leak=true", "jitter=0.1"), *OFF), padding="uneven"),
    Case("sinkhorn top-2, no loss, random",
         (*router("sinkhorn"), *factor(0.9, "policy=random"), *OFF), padding="uneven"),
    Case("hierarchical, no loss, jitter and dropout",
         (*EIGHT, *router("hierarchical", "top_groups=2"), "model.ffn.top_k=4", *SEEN_BY_ROUTER, *OFF)),
    Case("base, no loss", (*router("base"), *TOP_1, *OFF), padding="uneven",
         truth="one rank"),
]  # fmt: skip

MIXED = [
    Case("topk, importance and device loss, global reroute in choice order",
         (*loss("importance_load", "importance_coef=0.2", "load_coef=0.0"), *loss("device", "devices=2", "coef=0.3"),
          *factor(0.8, "scope=global", "reroute=true", "order=choice")), padding="uneven"),
    Case("topk_softmax, global device and communication loss, probability and reroute and renormalize",
         (*router("topk_softmax"), *loss("device", "devices=2", "scope=global"),
          *loss("communication", "devices=4", "scope=global", "coef=0.2"),
          *factor(0.7, "policy=probability", "reroute=true", "renormalize=after"), "router.jitter=0.1")),
    Case("sigmoid, loss-free by sign, aux per sequence, global random in choice order",
         (*router("sigmoid", "expert_dropout=0.1"), *loss("loss_free", "rate=0.05"), *loss("aux", "scope=sequence"),
          *factor(0.8, "scope=global", "policy=random", "order=choice")), padding="uneven"),
    Case("topk, loss-free with a bias that decides", (*loss("loss_free", "rate=0.1"), *OFF), start_bias=0.5),
    Case("noisy_topk, importance and load and all the others, random reroute",
         (*router("noisy_topk", "expert_dropout=0.2"), *loss("importance_load", "load_coef=0.3"),
          *loss("device", "devices=2"), *loss("communication", "devices=2"),
          *factor(0.9, "policy=random", "reroute=true")), padding="uneven"),
    Case("switch, loss-free by error, communication per sequence, global probability",
         (*router("switch"), *TOP_1, *loss("loss_free", "rate=0.1", "update=error"),
          *loss("communication", "devices=4"), *factor(1.0, "scope=global", "policy=probability"))),
    Case("gshard sampled with threshold, global aux, global position in choice order, renormalised after",
         (*router("gshard", "second=sampled", "dispatch_threshold=0.5"),
          *factor(0.8, "scope=global", "order=choice", "renormalize=after")), padding="uneven"),
    Case("gshard sampled with dropout and bias, global device budget",
         (*router("gshard", "second=sampled", "expert_dropout=0.3"), *loss("loss_free", "rate=0.05"),
          *loss("importance_load", "load_coef=0.0"), *device(0.8, "devices=2", "scope=global", "exempt_fraction=0.3")),
         start_bias=0.2),
    Case("group_limited after V3 with bias, all losses per sequence, padded buffers",
         (*EIGHT, *router("group_limited"), "model.ffn.top_k=3", *loss("loss_free", "rate=0.02"),
          *loss("aux", "scope=sequence"), *loss("device", "devices=4"), *loss("communication", "devices=4"),
          *factor(1.0, "pad=true", "policy=probability")), start_bias=0.3, padding="uneven"),
    Case("group_limited, dropout, global losses, reroute within groups",
         (*EIGHT, *router("group_limited", "scores=softmax", "expert_dropout=0.2"),
          *loss("device", "devices=4", "scope=global"), *factor(0.8, "reroute=true", "scope=global"))),
    Case("hash, random and padded and rerouting nothing", (*router("hash", "scale=2.0"),
         *factor(0.9, "policy=random", "pad=true", "renormalize=after"), *OFF), padding="uneven"),
    Case("hash, global position", (*router("hash"), *factor(0.9, "scope=global"), *OFF), padding="whole ranks"),
    Case("sinkhorn top-1, dropout, importance, global random reroute",
         (*router("sinkhorn", "expert_dropout=0.1", "max_iterations=7"), *TOP_1,
          *loss("importance_load", "load_coef=0.0"), *factor(0.9, "scope=global", "policy=random", "reroute=true"))),
    Case("hierarchical two in each of two groups, importance, global device budget",
         (*EIGHT, *router("hierarchical", "groups=4", "top_groups=2", "jitter=0.1"), "model.ffn.top_k=4",
          *loss("importance_load", "load_coef=0.0"), *loss("communication", "devices=4", "scope=global"),
          *device(0.9, "scope=global")), padding="uneven"),
    Case("base, z-loss, jitter and dropout, global probability",
         (*router("base"), *SEEN_BY_ROUTER, *TOP_1, "balance.aux=null",
          *factor(1.0, "scope=global", "policy=probability")), truth="one rank"),
    Case("padded buffers, probability, reroute, renormalised after",
         (*factor(0.8, "pad=true", "policy=probability", "reroute=true", "renormalize=after", "minimum=3"),
          "router.scale=2.0"), padding="uneven"),
    Case("padded buffers, choice order, ranks without tokens", factor(1.2, "pad=true", "order=choice"),
         padding="whole ranks", zero_router=True),
    Case("equal weights: the earlier token is kept",
         factor(0.6, "scope=global", "policy=probability"), zero_router=True, padding="uneven"),
    Case("equal tokens: expert_choice takes the earlier",
         (*router("expert_choice", "allow_future_leak=true"), *OFF), text="one token per sequence"),
    Case("equal tokens: base gives them the same experts on every layout",
         (*router("base"), *TOP_1, "balance.aux=null"), text="one token per sequence", truth="one rank"),
]  # fmt: skip

NOOP = ffn("num_noop_experts=2")
IDLE = [
    Case("no-op experts, topk, global reroute", (*NOOP, *factor(0.7, "scope=global", "reroute=true")),
         padding="uneven"),
    Case("no-op experts, topk, unnormalised, loss-free by sign, padded buffers in choice order, renormalised after",
         (*NOOP, *router("topk", "normalize=none"), *loss("loss_free", "rate=0.1"),
          *factor(0.7, "pad=true", "order=choice", "renormalize=after")), start_bias=0.3, padding="uneven"),
    Case("no-op experts, sigmoid, loss-free by error, aux per sequence, shared expert, one module ahead",
         (*NOOP, *router("sigmoid"), *SEEN_BY_ROUTER, *loss("loss_free", "rate=0.1", "update=error"),
          *loss("aux", "scope=sequence"), *ffn("num_shared_experts=1"), *ahead(1), *ONE)),
    Case("no-op experts, topk_softmax with bias", (*NOOP, *router("topk_softmax", "bias=true"), *ONE),
         padding="whole ranks"),
    Case("no-op experts, noisy_topk, importance and load, probability",
         (*NOOP, *router("noisy_topk"), *loss("importance_load", "load_coef=0.3"),
          *factor(0.8, "policy=probability")), padding="uneven"),
    Case("no-op experts, switch, random", (*NOOP, *router("switch", "jitter=0.3"), *TOP_1,
         *factor(0.8, "policy=random"))),
]  # fmt: skip
"""Tokens may choose to pass the experts by."""

DEPENDS_ON_LAYOUT = [
    Case("capacity per rank, padded buffers, reroute",
         factor(0.7, "scope=rank", "pad=true", "policy=probability", "reroute=true"), padding="uneven"),
    Case("device budget per rank, losses per micro-batch",
         (*loss("aux", "scope=micro"), *loss("device", "devices=2", "scope=micro"),
          *loss("communication", "devices=2", "scope=micro"), *device(0.8, "devices=2", "scope=rank")),
         padding="uneven"),
]  # fmt: skip
"""They claim no contract; they are to do what the oracle does when it knows how the batch was cut."""

ARCHITECTURES = [
    Case("DeepSeek-V3: latent attention, groups with bias, losses per sequence, first dense, shared, two modules ahead",
         (*MLA, *YARN, *attention("q_rank=6", "yarn.mscale_all_dim=0.5"), *router("group_limited", "scale=2.5"),
          *ffn("num_experts=8", "top_k=3", "first_dense=1", "num_shared_experts=2", "shared_dim=5"),
          *loss("loss_free", "rate=0.02", "freeze_after=0.5"), *loss("aux", "scope=sequence"),
          *ahead(2, "late_coef=0.6", "late_after=0.5")), start_bias=0.3, padding="uneven"),
    Case("DeepSeek-V2-Lite: plain queries, budget and losses of devices, one module ahead",
         (*EIGHT, *MLA, *YARN, *attention("yarn.truncate=false", "yarn.mscale_all_dim=0.7"),
          *router("group_limited", "top_groups=3"), *V2, *ffn("top_k=3", "num_shared_experts=1"),
          *loss("device", "devices=4"), *loss("communication", "devices=4"), *loss("aux", "scope=sequence"),
          *device(0.9, "exempt_fraction=0.4"), *ahead(1)), padding="uneven"),
    Case("gpt-oss: sinks, windows, biases everywhere, clamped activation, one module ahead",
         (*YARN, *attention("head_dim=8", "qkv_bias=true", "out_bias=true", "sinks=true", "window=3", "full_every=2",
                            "rope_theta=100.0", "yarn.truncate=false"),
          *router("topk_softmax", "bias=true"), *ffn("activation=swiglu_clamped", "expert_bias=true"),
          "model.init_std=1.0", "model.tie_embeddings=false", *ahead(1)), padding="uneven"),
    Case("Qwen2-MoE: biased queries, gated shared experts, every other layer",
         (*attention("qkv_bias=true"), *router("topk", "normalize=none"),
          *ffn("every=2", "num_shared_experts=1", "shared_dim=7", "shared_gate=true"))),
    Case("Qwen3-MoE: norms of each head, wide heads, positions stretched as in Llama 3.1",
         ("model.layers=1", "model.heads=4", *attention("kv_heads=2", "head_dim=6", "qk_norm=head", "rope_theta=50",
                                                        "llama3.original_length=16", "llama3.factor=4"))),
    Case("OLMoE: norms over all heads, window everywhere",
         ("model.layers=1", "model.heads=4", "model.tie_embeddings=false",
          *attention("kv_heads=2", "qk_norm=full", "window=2"), *router("topk", "normalize=none")), padding="uneven"),
    Case("Switch: relu, top-1, capacity",
         (*router("switch"), *TOP_1, *ffn("activation=relu", "every=2"), *factor(1.0), "balance.z_loss=null")),
    Case("GLaM: geglu between, gelu in biased experts, capacity over the batch",
         (*router("gshard"), *ffn("activation=geglu", "expert_activation=gelu", "expert_bias=true", "every=2"),
          *factor(0.9, "scope=global", "order=choice"))),
    Case("two modules ahead, losses over the step",
         ("model.layers=1", *router("noisy_topk"), *loss("importance_load", "load_coef=0.3"),
          *loss("device", "devices=2", "scope=global"), *ahead(2)), padding="uneven"),
    Case("two modules ahead, hash", (*router("hash"), *OFF, *ahead(2), "model.layers=1"), padding="uneven"),
    Case("one module ahead, expert_choice, no loss",
         (*router("expert_choice", "allow_future_leak=true", "jitter=0.1"), *OFF, *ahead(1), "model.layers=1"),
         padding="uneven"),
    Case("two modules ahead, random and rerouting over the batch, MoE every other layer",
         (*factor(0.8, "scope=global", "policy=random", "reroute=true"), *ahead(2), *ffn("every=2"))),
    Case("two modules ahead, dense",
         (*ffn("num_experts=0", "activation=gelu"), *ahead(2, "coef=0.5"), "model.layers=1"), padding="whole ranks"),
]  # fmt: skip

GRAPH = [
    Case("graph of networks as by default", (*ONE, *graph("ffn"))),
    Case("graph of blocks as the original: LayerNorm, biases, learned positions, own head",
         (*ONE, *graph("block", "combiner=gelu_norm"), *ffn("activation=gelu", "expert_bias=true"),
          *attention("qkv_bias=true", "out_bias=true", "kv_heads=null"), "model.norm=layer",
          "model.positions=learned", "model.max_positions=7", "model.tie_embeddings=false", "model.head_bias=true"),
         padding="uneven"),
    Case("graph of networks in chunks, recomputed, orthogonal, two of three sources, softmax, attention pooling",
         (*ONE, *graph("ffn", "chunk_tokens=13", "recompute=true", "orthogonality=0.7", "adjacency=softmax",
                       "similarity=cosine", "max_neighbors=2", "pooling=attention", "layers=1")),
         padding="whole ranks"),
    Case("graph of blocks by chunks, recomputed, orthogonal, self edges, degree, one module ahead",
         (*ONE, *graph("block", "chunk_tokens=14", "recompute=true", "orthogonality=0.7", "self_edges=true",
                       "similarity=cosine", "normalize=degree", "layers=1"), *ahead(1, "coef=0.6")),
         padding="uneven"),
    Case("graph of networks without logits, dot, count, weighted pooling, linear combiner, every other layer",
         (*graph("ffn", "adjacency=none", "similarity=dot", "normalize=count", "pooling=weighted", "combiner=linear",
                 "layers=1"), *ffn("every=2", "expert_bias=true", "expert_activation=relu"), "model.norm=layer")),
    Case("graph of networks with one source each, self edges, learned positions, one module ahead",
         (*ONE, *graph("ffn", "max_neighbors=1", "self_edges=true", "orthogonality=0.3", "adjacency_mean=-1.0",
                       "layers=1"), *ahead(1), "model.positions=learned", "model.max_positions=6"),
         padding="uneven"),
    Case("graph of networks without messages", (*ONE, *graph("ffn", "max_neighbors=0", "layers=1"))),
    Case("graph of latent-attention blocks, only pooled", (*ONE, *MLA, *YARN, *graph("block", "layers=0"))),
]  # fmt: skip
SWITCHHEAD = attention("kind=switchhead", "experts=4", "top_k=2", "head_dim=4", "expert_dropout=0.3", "scale=1.5")
HEADS = [
    Case("SwitchAll: experts in attention, sigma-MoE, entropy over the step on both",
         (*SWITCHHEAD, *attention("entropy=0.1"), *router("sigmoid", "normalize=none", "expert_dropout=0.05"),
          *ffn("activation=relu"), *loss("entropy", "coef=0.1"), *OFF), padding="uneven"),
    Case("experts in attention alone, positions learned, one module ahead",
         (*SWITCHHEAD, *ONE, *ffn("num_experts=0"), "model.positions=learned", "model.max_positions=6",
          *ahead(1, "coef=0.6")), padding="uneven"),
    Case("experts in attention and fewer in the layer, capacity, entropy per sequence, ranks without tokens",
         (*SWITCHHEAD, *ONE, *attention("top_k=4", "expert_dropout=0.0", "yarn.factor=4.0", "entropy=0.2"),
          *loss("entropy", "scope=sequence"), *factor(0.8)), padding="whole ranks"),
]  # fmt: skip
"""The second one's feed-forward network is dense; in the third a token takes all experts of each head."""


def classifier(*keys: str) -> tuple[str, ...]:
    return ("model.classifier.num_classes=3", *(f"model.classifier.{key}" for key in keys))


TEXTS = [
    Case("encoder with experts: tokens see their whole text, words left out, jitter and dropout in the routers",
         (*classifier("kind=linear", "token_dropout=0.4"), *attention("causal=false", "qkv_bias=true"),
          *router("topk_softmax"), *SEEN_BY_ROUTER, *ffn("num_shared_experts=1")), padding="uneven"),
    Case("no block, a gate with a hidden layer, experts in the head, words left out, runs, naive Bayes, lexicon",
         (*classifier("kind=experts", "token_dropout=0.4", "hidden_dims=[5,3]"), "model.layers=0",
          *classifier("pool=root", "ngrams.rows=11", "ngrams.longest=3", "naive_bayes.rows=13",
                      "lexicon.rows=64")[1:],
          *router("topk_softmax", "gate_dim=7", "jitter=0.2"),
          *loss("importance_load", "importance_coef=0.2", "load_coef=0.0")), padding="uneven"),
    Case("experts in causal blocks and in the head, moved biases, losses per sequence, ranks without texts",
         (*classifier("kind=experts", "hidden_dims=[6]", "token_norm=false"), *router("sigmoid"),
          *loss("loss_free", "rate=0.05"),
          *loss("aux", "scope=sequence"), *ffn("first_dense=1")), start_bias=0.3, padding="whole ranks"),
]  # fmt: skip
"""What tells the class of a text."""
ON_ALL_LAYOUTS = [*PLAIN, *GRAPH[:2]]
"""The others are run on a few of them."""

CASES = [*PLAIN, *NO_LOSS, *MIXED, *IDLE, *ARCHITECTURES, *DEPENDS_ON_LAYOUT, *GRAPH]
