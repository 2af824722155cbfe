"""The native decoder, in which every layer can be an exit, and its growth.

- A layer is Llama's: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention; by choice with Qwen2's
  biases or Qwen3's norms. A checkpoint of these families maps onto the parameters one to one (`ease.hf`).
- Exit k is `exit_norms[k - 1]` and then the one shared `output_head`. With a memory, exit 0 is `memory.norm` and the
  head.
- Nothing outside this file and `modules/` depends on the inside of a layer.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.errors import EaseError, check_choice, check_integer, check_names, checked
from ease.inputs import as_ids
from ease.interface import ExitModel, Layout, call_layer, check_in_memory, evaluation_view
from ease.model_config import ModelConfig
from ease.modules import (
    Adapter,
    Cache,
    CachedPlan,
    DraftBrick,
    Memory,
    Plan,
    Prefix,
    PrefixPlan,
    TransformerBlock,
    decoding_layer,
    new_norm,
    with_stored_tokens,
    with_tokens_before,
)
from ease.modules.functional import is_altered
from ease.modules.products import inference_product
from ease.policy import Policy


class StandardTransformer(ExitModel):
    """A decoder without routing. Every layer has an exit norm nevertheless, so weights fit both model classes.

    Args:
        vocab_size: size of the vocabulary.
        dim: width D of the state.
        num_layers: number of layers.
        num_heads: number of query heads.
        options: further fields of `ModelConfig`.

    Example:
        >>> model = ease.StandardTransformer(vocab_size=256, dim=64, num_layers=4)
        >>> model(ids).shape  # ids (B, T)
        torch.Size([B, T, 256])
    """

    def __init__(self, vocab_size: int, dim: int = 64, num_layers: int = 3, num_heads: int = 4, **options: Any) -> None:
        super().__init__()
        check_names(type(self).__name__, options, [f.name for f in fields(ModelConfig)[4:]])
        self.config = c = ModelConfig(vocab_size, dim, num_layers, num_heads, **options)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.memory = Memory(c) if c.memory_orders else None
        self.layers = nn.ModuleList(self._new_layer(layer) for layer in range(1, num_layers + 1))
        self.exit_norms = nn.ModuleList(new_norm(c, dim) for _ in range(num_layers))
        self.exit_classifiers = nn.ModuleDict({str(e): nn.Linear(dim, 1) for e in c.classifier_exits})
        self.exit_adapters = nn.ModuleDict({str(e): Adapter(dim, c.adapter_dim) for e in c.adapter_exits})
        self.draft_brick = self._new_draft_brick() if c.draft_brick else None
        self.output_head = nn.Linear(dim, c.outputs, bias=False)
        if c.tie_embeddings:
            self.output_head.weight = self.embedding.weight
        nn.init.normal_(self.output_head.weight, std=0.02)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        return len(self.layers)

    def embed(self, ids: Tensor, *, layout: Layout | None = None, cache: Cache | None = None) -> Tensor:
        ids = as_ids("ids", ids)
        if ids.device.type == "cpu":  # elsewhere a check would wait for the device: callers check before they move ids
            self.check_ids(ids, self.config.vocab_size)
        if cache is not None:
            self._place(ids, layout, cache)
        state = self._look_up(ids, layout, cache)
        if cache is not None:
            cache.store(cache.states, state)
        return state

    def embedded(self, vectors: Tensor, *, layout: Layout | None = None, cache: Cache | None = None) -> Tensor:
        """As `embed`, for tokens whose rows of the embedding are `vectors` (B, T, D).

        Raises:
            EaseError: the model has a memory, which reads ids.
        """
        if self.memory is not None:
            raise EaseError("the memory of this model looks token ids up: give input_ids in place of embeddings")
        state = F.dropout(self._scaled(vectors), self.config.dropout, self.embedding.training)
        if cache is not None:
            self._place(state, layout, cache)
            cache.store(cache.states, state)
        return state

    def _scaled(self, vectors: Tensor) -> Tensor:
        if self.config.embedding_scale == 1:
            return vectors
        # Rounded to the model's dtype, as Gemma does.
        return vectors * float(torch.tensor(self.config.embedding_scale, dtype=vectors.dtype))

    def _place(self, tokens: Tensor, layout: Layout | None, cache: Cache) -> None:
        """Appends tokens (B, T, ...) to the cache, without their states."""
        cache.place(np.ones(tokens.shape[:2], np.bool_) if layout is None else layout.host.real.numpy())
        if cache.ids is not None:
            cache.store(cache.ids, tokens)

    def _look_up(self, ids: Tensor, layout: Layout | None, cache: Cache | None) -> Tensor:
        """ids (B, T), which the cache holds already, -> state (B, T, D) before layer 1."""
        state = self._scaled(self.embedding(ids))
        if self.memory is not None:
            if cache is None:
                tokens = with_tokens_before(ids, self.memory.reach, layout)
            else:
                assert cache.ids is not None
                tokens = with_stored_tokens(cache.ids, cache.tensor(cache.slots), self.memory.reach)
            state = state + self.memory(tokens)
        return F.dropout(state, self.config.dropout, self.embedding.training)

    def run(
        self,
        state: Tensor,
        first: int,
        last: int,
        *,
        layout: Layout | None = None,
        active: Tensor | None = None,
        cache: Cache | Prefix | None = None,
    ) -> Tensor:
        check_integer("the first layer", first)
        check_integer("the last layer", last)
        if (first, last) == (1, 0):
            return state
        if not 1 <= first <= last <= self.num_layers:
            raise EaseError(f"the model has layers 1..{self.num_layers}, got {first}..{last}")
        c = self.config
        if isinstance(cache, Cache):
            return self._run_cached(state, first, last, layout, active, cache)
        shape = (state, c.rotary_size, layout, active)
        plan = Plan.make(*shape) if cache is None else PrefixPlan.after(cache, *shape)
        call = self.call_layer if self.training else call_layer
        for plan.layer in range(first, last + 1):
            layer: Any = self.layers[plan.layer - 1]
            plan.view(layer.attention.kind)  # made here, where no layer is compiled or run again
            state = call(layer, state, plan)
        return state

    def _run_cached(
        self, state: Tensor, first: int, last: int, layout: Layout | None, active: Tensor | None, cache: Cache
    ) -> Tensor:
        real = np.ones(state.shape[:2], np.bool_) if layout is None else layout.host.real.numpy()
        if first == 1 and not cache.embedded:
            if self.memory is not None:
                raise EaseError("the memory needs the ids of the cached tokens: give the cache to `embed`, too")
            cache.place(real)
            cache.store(cache.states, state)
        cache.embedded = False
        running = real if active is None else active.cpu().numpy() & real
        if not running.any():
            return state
        cache.check_fill(first, last, running)
        plan = CachedPlan.of(cache, first, running)
        x = plan.start()
        for plan.layer in range(first, last + 1):
            x = cache.blocks[plan.layer - 1](x, plan)
        return plan.finish(x, state, first, last)

    def new_cache(self, rows: int, capacity: int, key: object = None) -> Cache:
        """A cache for `capacity` tokens in each of `rows` rows.

        Args:
            key: the mode and policy that the cache belongs to; `Cache.check` refuses any other.
        """
        c, like = self.config, self.embedding.weight
        check_in_memory(like)
        blocks = [decoding_layer(layer) for layer in self.layers]
        shape = rows, capacity, c.kv_heads, c.head_size, c.rotary_size
        return Cache(blocks, *shape, like, key, keeps_ids=self.memory is not None)

    def memory_tables(self) -> list[nn.Parameter]:
        return [] if self.memory is None else [self.memory.table]

    def set_sparse_gradients(self, on: bool) -> None:
        if self.memory is not None:
            self.memory.sparse_gradient = on

    def decoding_view(self) -> Self:
        """A copy in evaluation mode that shares the weights, with a head that is faster for few rows on a CPU."""
        view = evaluation_view(self)
        head = view.output_head
        if type(head) is nn.Linear and not is_altered(head):
            head.forward = inference_product(head.weight, head.bias)  # type: ignore[method-assign, assignment]
        return view

    def exit_norm(self, state: Tensor, exit: int) -> Tensor:
        normed: Tensor = self._norm_of(exit)(state)
        if str(exit) in self.exit_adapters:
            normed = self.exit_adapters[str(exit)](normed)
        return normed if self.config.logit_divisor == 1 else normed / self.config.logit_divisor

    def _norm_of(self, exit: int) -> nn.Module:
        if not self.first_exit <= exit <= self.num_layers:
            raise EaseError(f"the model has exits {self.first_exit}..{self.num_layers}, got {exit}")
        return self.exit_norms[exit - 1] if exit else cast(Memory, self.memory).norm

    def exit_confidence(self, state: Tensor, exit: int) -> Tensor:
        if str(exit) not in self.exit_classifiers:
            raise EaseError(f"exit {exit} has no classifier: train one (ease.learn_agreement), or use another measure")
        if exit in self.stale_classifiers:
            raise EaseError(
                f"the classifier of exit {exit} is stale, since layers or the norm below it were trained after it: "
                "train it again (ease.learn_agreement), or use another measure"
            )
        # From the exit's norm only: an adapter in front of the head would cost more than the classifier.
        normed = self._norm_of(exit)(state)
        classifier: Any = self.exit_classifiers[str(exit)]
        if not isinstance(classifier.weight, Tensor):  # quantized
            return cast(Tensor, classifier(normed)).squeeze(-1).sigmoid()
        # In half precision many tokens would have the same confidence.
        kind = torch.promote_types(normed.dtype, torch.float32)
        if type(classifier) is nn.Linear and not is_altered(classifier):
            odds = F.linear(normed.to(kind), classifier.weight.to(kind), classifier.bias.to(kind))
        else:
            odds = classifier(normed).to(kind)
        return odds.squeeze(-1).sigmoid()

    def set_classifiers(self, weights: Mapping[int, Tensor]) -> None:
        """Adds a classifier to exits below the last one.

        Args:
            weights: exit -> (D + 1,), of which the last is the bias.
        """
        self.config = replace(self.config, classifier_exits=tuple(sorted({*self.config.classifier_exits, *weights})))
        for exit, weight in weights.items():
            made = nn.Linear(self.config.dim, 1)
            made.load_state_dict({"weight": weight[None, :-1], "bias": weight[-1:]})
            self.exit_classifiers[str(exit)] = made.to(self.embedding.weight).train(self.training)
        self.stale_classifiers -= weights.keys()

    def mark_stale_classifiers(self, trained: Iterable[Tensor], learned: Sequence[int]) -> None:
        self.stale_classifiers -= set(learned)
        changed = set(map(id, trained))
        for exit in set(self.config.classifier_exits) - set(learned):
            below = (*self._brick_0(), *self.layers[:exit], self._norm_of(exit))
            if any(id(parameter) in changed for module in below for parameter in module.parameters()):
                self.stale_classifiers.add(exit)

    def add_adapters(self, exits: Sequence[int], dim: int) -> None:
        """Adds an adapter of `dim` hidden units to exits below the last one; it starts as the identity."""
        if self.config.adapter_exits and self.config.adapter_dim != dim:
            raise EaseError(
                f"the model has adapters of {self.config.adapter_dim} units: give new ones the same number, got {dim}"
            )
        every = tuple(sorted({*self.config.adapter_exits, *exits}))
        self.config = replace(self.config, adapter_exits=every, adapter_dim=dim)
        for exit in exits:
            self.exit_adapters[str(exit)] = Adapter(self.config.dim, dim).to(self.embedding.weight).train(self.training)

    def add_draft_brick(self, vocabulary: Tensor, states: Tensor) -> None:
        """Adds a new draft brick, in place of one that the model has.

        Args:
            vocabulary: (N,) distinct ids of the tokens that it can draft.
            states: (..., D) states of the last layer, which the weights of its norms are made for.
        """
        self.check_ids(vocabulary, self.config.vocab_size)
        self.config = replace(self.config, draft_brick=True, draft_vocabulary=len(vocabulary))
        brick = self._new_draft_brick().to(self.embedding.weight)
        brick.start_at(states.flatten(0, -2), cast(nn.RMSNorm, self.exit_norms[-1]))
        brick.vocabulary = vocabulary.to(self.embedding.weight.device, torch.long, copy=True)
        self.draft_brick = brick.requires_grad_(False).train(self.training)

    def draft(self, states: Tensor, ids: Tensor, *, layout: Layout | None = None, cache: Cache | None = None) -> Tensor:
        """The draft brick, over whole rows or, with a cache from `new_draft_cache`, after what the cache holds.

        Args:
            states: (B, T, D) states h_t of the last layer, or what this method gave for the token before.
            ids: (B, T) the tokens x_{t+1} that follow.
            layout: positions and segments; with a cache only its segments are read, -1 where a row has no token.
            cache: keys and values of the tokens before. It appends the tokens; `Cache.cut` removes them.

        Returns:
            g (B, T, D), from which `draft_tokens` predicts x_{t+2}.

        Raises:
            EaseError: the model has no draft brick.
        """
        brick = self._brick()
        if cache is not None:
            self._place(ids, layout, cache)
            fused = brick.fused(states, self._look_up(ids, layout, cache))
            cache.store(cache.states, fused)
            normed: Tensor = brick.norm(self._run_cached(fused, 1, 1, layout, None, cache))
            return normed
        plan = Plan.make(states, self.config.rotary_size, layout, None)
        out: Tensor = brick(states, self.embed(ids, layout=layout), plan)
        return out

    def draft_logits(self, drafts: Tensor) -> Tensor:
        """g (..., D) from `draft` -> logits (..., N) over `draft_brick.vocabulary`."""
        brick, weight = self._brick(), self.output_head.weight
        if type(weight) not in (Tensor, nn.Parameter):  # quantized: there are no rows to take from it
            return self.head_logits(brick.normed(drafts))[..., brick.vocabulary]
        return brick.logits(drafts, weight)

    def draft_tokens(self, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """g (..., D) from `draft` -> the most likely ids (...), and their probabilities (...) among the N tokens."""
        logits = self.draft_logits(drafts)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, at = logits.max(-1)
        return self._brick().vocabulary[at], (best - logits.logsumexp(-1)).exp()

    def new_draft_cache(self, rows: int, capacity: int) -> Cache:
        """A cache of the draft brick for `capacity` tokens in each of `rows` rows."""
        c = self.config
        block, shape = decoding_layer(self._brick().block), (rows, capacity, c.kv_heads, c.head_size, c.rotary_size)
        return Cache([block], *shape, self.embedding.weight, keeps_ids=self.memory is not None)

    def _brick(self) -> DraftBrick:
        if self.draft_brick is None:
            raise EaseError("the model has no draft brick: train one (ease tune --adapter brick)")
        return self.draft_brick

    @checked
    def grow(self, num_layers: int, init: Literal["identity", "copy"] = "identity") -> StandardTransformer:
        """Adds layers on top, in place, up to `num_layers`; existing exits keep their output bit for bit.

        A draft brick is dropped with a warning, since it reads the states of the layer that was the last.

        The random weights of a new layer depend on its number and on the seed that torch was given last
        (`torch.initial_seed`), not on the random numbers drawn since, which differ between numbers of processes.

        Args:
            init: "identity": new layers start as the identity, so that the new last exit equals the old one. "copy":
                new layers start as copies of the topmost trained ones (progressive stacking, Gong et al. 2019), and
                above no layers as the identity.

        Returns:
            The model.

        Raises:
            EaseError: the model is not shallower than `num_layers`.
        """
        old = self.num_layers
        if num_layers <= old:
            raise EaseError(f"the model has {old} layers already: grow to more than that, got {num_layers}")
        check_choice("init", init, ("identity", "copy"))
        weight = self.embedding.weight
        for k in range(old, num_layers):
            layer: Any
            if init == "copy" and old:
                layer = copy.deepcopy(self.layers[max(0, 2 * old - num_layers) + (k - old) % old])
                layer.attention.kind = self.config.attention_kind(k + 1)
            else:
                with _seeded(torch.initial_seed(), k + 1):
                    layer = self._new_layer(k + 1)
                layer.make_identity()
            self.layers.append(layer.to(weight).requires_grad_().train(self.training))
            self.exit_norms.append(copy.deepcopy(self._norm_of(old)).requires_grad_())
        if self.draft_brick is not None:
            warnings.warn(
                f"the draft brick reads the states of layer {old} and is dropped: train another for the new last layer "
                "(ease tune --adapter brick)",
                stacklevel=2,
            )
            self.draft_brick = None
        self.config = replace(self.config, num_layers=num_layers, draft_brick=False, draft_vocabulary=None)
        return self

    def parameters_of(self, layer: int) -> Iterator[nn.Parameter]:
        modules = [self.layers[layer - 1], self.exit_norms[layer - 1]]
        modules += [part[str(layer)] for part in (self.exit_adapters, self.exit_classifiers) if str(layer) in part]
        modules += [self.embedding] if layer == 1 and not self.config.tie_embeddings else []
        return itertools.chain.from_iterable(module.parameters() for module in modules)

    def freeze_below(
        self, first: int, *, head: bool = True, exits: Sequence[int] = (), classifiers: Sequence[int] = ()
    ) -> None:
        if first > self.first_exit and not head and self.config.tie_embeddings:
            raise EaseError(
                "a trainable head on a frozen trunk would change the embedding that it is tied to: "
                "use tie_embeddings=False, or freeze the head"
            )
        self.requires_grad_(True)
        if self.draft_brick is not None:  # a trainer of its own trains it
            self.draft_brick.requires_grad_(False)
        for name, classifier in self.exit_classifiers.items():
            classifier.requires_grad_(int(name) in classifiers)
        if first > self.first_exit:
            for module in (*self._brick_0(), *self.layers[: first - 1], *self.exit_norms[: first - 1]):
                module.requires_grad_(False)
            for name, adapter in self.exit_adapters.items():
                adapter.requires_grad_(int(name) >= first or int(name) in exits)
            for exit in exits:
                self._norm_of(exit).requires_grad_(True)
            self.output_head.requires_grad_(not head)

    def _brick_0(self) -> list[nn.Module]:
        """What is below layer 1: the embedding, and the memory with its exit."""
        return [self.embedding] if self.memory is None else [self.embedding, self.memory]

    def _new_draft_brick(self) -> DraftBrick:
        brick = DraftBrick(self.config)
        self._initialize(brick.block)
        nn.init.normal_(brick.fuse.weight, std=brick.fuse.in_features**-0.5)
        return brick

    def _new_layer(self, number: int) -> TransformerBlock:
        layer = TransformerBlock(self.config, number)
        self._initialize(layer)
        return layer

    def _initialize(self, layer: TransformerBlock) -> None:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Each branch adds to the residual stream; this scale keeps the sum from growing with depth (GPT-2).
        for end in (layer.attention.o_proj, layer.ffn.down_proj):
            nn.init.normal_(end.weight, std=(2 * max(1, self.config.num_layers) * end.in_features) ** -0.5)


class DeepSupervisionTransformer(StandardTransformer):
    """A decoder with the same weights and a routing policy: tokens may leave at `exit_layer`.

    Args:
        exit_layer: the exit, or a sequence of exits from shallow to deep.
        routing_threshold: confidence in [0, 1] at which a token leaves; a sequence as long as `exit_layer`
            for several exits. 0.0 means no routing, and `exit_layer` is then ignored.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 64,
        num_layers: int = 3,
        num_heads: int = 4,
        exit_layer: int | Sequence[int] = 1,
        routing_threshold: float | Sequence[float] = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(vocab_size, dim, num_layers, num_heads, **options)
        self.policy = Policy.of(exit_layer, routing_threshold)
        self.check_policy(self.policy)


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """A context in which random numbers of the CPU depend on the numbers alone; those after it are as without it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash(numbers) % 2**63)  # a hash of integers is the same in every process
        yield
