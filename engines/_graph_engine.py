"""The engine: a prompt graph and a decoder graph on any runtime, one cache, masks, and the check of golden inputs.

Every call of the decoder graph writes its rows behind the committed ones, into rows that the next call overwrites
unless `commit` counts them in. A chain that is accepted from its root is thereby committed by adding to a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from vla_spec.engines._graph_runtime import Array, Call, GraphRuntime
from vla_spec.engines._model_files import DECODER_GRAPH, GOLDEN, PROMPT_GRAPH, WEIGHTS, ModelFiles, read_golden
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.errors import BadConfig, BadModel
from vla_spec.interfaces import EngineInfo
from vla_spec.types import EngineInputs, Float32, Int32, Scores

#: Largest difference to the reference's logits on the golden inputs, relative to their spread, by precision.
GOLDEN_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 0.5}
#: Calls of one token that an engine in int8 has to repeat in one call to be believed batch-invariant.
PROOF_CALLS = 16


class _Buffers(NamedTuple):
    """Inputs and outputs of a decoder call over n rows, and the call; reused by every call of that size."""

    embeds: Float32  # [n, D]
    position: Array  # int64 [n]
    mask: Array  # bool [n, R], a view of what the graph gets
    write_index: Array  # int64 [1]
    logits: Float32  # [n, V]
    features: Float32  # [n, F]
    call: Call


@final
class GraphEngine:
    """An `Engine` over two graphs. Not thread-safe.

    Args:
        model_dir: a model folder.
        runtime: what runs its graphs.
        max_step: most tokens of one step; None = as many as the graph has scratch rows.
        golden_tolerance: see `GOLDEN_TOLERANCE`; None = the one of the runtime's precision.
        is_checked: run the golden inputs. False is for the one who writes them.

    Raises:
        BadModel: files missing, corrupt, or not the model that export verified (golden inputs are run at load).
        BadConfig: max_step is more than the graph was exported for.
        SlowPath: the runtime would run somewhere slower than asked for.
    """

    def __init__(
        self,
        model_dir: Path,
        runtime: GraphRuntime,
        max_step: int | None = None,
        golden_tolerance: float | None = None,
        is_checked: bool = True,
    ) -> None:
        files = ModelFiles.open(model_dir)
        self.runtime = runtime
        self.spec = spec = files.decoder
        self._max_step = spec.max_step if max_step is None else max_step
        if not 1 <= self._max_step <= spec.max_step:
            raise BadConfig(
                f"engine {runtime.name}: max_step {self._max_step}; valid: 1 to {spec.max_step}, for which {model_dir} "
                f"was exported"
            )
        self._files = files
        self._prompt = runtime.open(model_dir / PROMPT_GRAPH)
        self._decoder = runtime.open(model_dir / DECODER_GRAPH)
        self._state = runtime.state(spec.state_shape)
        weights = WeightsFile.open(model_dir / WEIGHTS)
        self._token = weights.read(files.token_embedding)
        self._position = weights.read(files.position_embedding) if files.position_embedding else None
        self._features = np.zeros((spec.rows, spec.feature_width), np.float32)
        self._prompt_embeds = np.zeros((0, spec.hidden_width), np.float32)
        self._causal = np.tri(spec.max_step, dtype=bool)
        self._chain = np.arange(-1, spec.max_step - 1, dtype=np.int32)
        self._counting = np.arange(spec.rows, dtype=np.int64)
        self._buffers: dict[int, _Buffers] = {}
        self._prompts: dict[tuple[tuple[int, ...], ...], tuple[dict[str, Array], Call, _Buffers, int]] = {}
        self._current: _Buffers | None = None
        self._length = 0
        self._is_dirty = False
        self._info = EngineInfo(
            runtime.name, files.weights_sha256, runtime.precision, runtime.provider, has_tree_mask=True,
            has_inplace_kv=True, is_batch_invariant=runtime.is_batch_invariant,
        )  # fmt: skip
        if is_checked:
            golden = read_golden(model_dir / GOLDEN)
            self._check_golden(golden, model_dir / GOLDEN, golden_tolerance)
            if runtime.precision == "int8" and runtime.is_batch_invariant:
                self._info = self._info._replace(is_batch_invariant=self._repeats_itself(golden))

    @property
    def info(self) -> EngineInfo:
        """Identity and capabilities."""
        return self._info

    @property
    def length(self) -> int:
        """Committed cache rows, prompt included."""
        return self._length

    @property
    def max_step(self) -> int:
        """Most tokens that one `step` takes."""
        return self._max_step

    @property
    def features(self) -> Float32:
        """float32 [length, F], valid until the next `prefill`."""
        return self._features[: self._length]

    @property
    def prompt_embeds(self) -> Float32:
        """float32 [p, D], what the decoder read as the prompt, valid until the next `prefill`."""
        return self._prompt_embeds

    def prefill(self, inputs: EngineInputs) -> Scores:
        """Start over. Returns one row, about the first token of the chunk."""
        if self._is_dirty:
            self._state.clear()
            self._is_dirty = False
        key = tuple(inputs[name].shape for name in self._prompt.inputs)
        if key not in self._prompts:
            self._prompts[key] = self._tie_prompt(inputs)
        arrays, call, buffers, p = self._prompts[key]
        for name, array in arrays.items():
            array[...] = inputs[name]
        call.run()
        buffers.mask[:, p:] = False
        buffers.mask[:p, :p] = True if self.spec.prompt_attention == "full" else np.tri(p, dtype=bool)
        _let_padding_look(buffers.mask, p, 0)
        buffers.position[:] = self._counting[: len(buffers.position)]
        buffers.write_index[0] = 0
        buffers.call.run()
        logits, features = buffers.logits[p - 1 : p], buffers.features[:p]
        self._features[:p] = features
        self._prompt_embeds = buffers.embeds[:p]
        self._length, self._current = p, None
        self._note_bad_numbers(logits)
        return Scores(logits, features[-1:])

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        """Score n tokens on top of the committed ones."""
        k, length = len(tokens), self._length
        assert 1 <= k <= self._max_step, f"{k=} {self._max_step=}"
        buffers = self._buffers.get(k) or self._tie_step(k)
        mask, position = buffers.mask, buffers.position
        mask[:, :length] = True
        mask[:, length:] = False
        tree = mask[:k, length : length + k]
        if np.array_equal(parents, self._chain[:k]):
            tree[:] = self._causal[:k, :k]
            position[:k] = self._counting[length : length + k]
        else:
            for i, parent in enumerate(parents.tolist()):
                if parent >= 0:
                    tree[i] = tree[parent]
                    position[i] = position[parent] + 1
                else:
                    position[i] = length
                tree[i, i] = True
        if self._position is None:
            np.take(self._token, tokens, 0, buffers.embeds[:k])
        else:
            # Nodes beyond the end of the chunk can be drafted, never accepted: any valid position will do.
            np.minimum(position, len(self._position) - 1, out=position)
            np.add(self._token[tokens], self._position[position[:k]], out=buffers.embeds[:k])
        _let_padding_look(mask, k, length)
        buffers.write_index[0] = length
        buffers.call.run()
        self._current = buffers
        logits = buffers.logits[:k]
        self._note_bad_numbers(logits)
        return Scores(logits, buffers.features[:k])

    def commit(self, path: Int32) -> None:
        """Keep these nodes of the last step."""
        assert self._current is not None, "commit without a step"
        start, count = self._length, len(path)
        end = start + count
        assert end <= self.spec.capacity, f"{end=} {self.spec.capacity=}"
        if count and path[-1] == count - 1:  # a chain from the root: its rows lie where they belong
            self._features[start:end] = self._current.features[:count]
        elif count:
            self._state.move(start, path + start)
            self._features[start:end] = self._current.features[path]
        self._length = end
        self._current = None

    def _note_bad_numbers(self, logits: Float32) -> None:
        if not np.isfinite(logits.sum()):
            self._is_dirty = True

    def _tie_step(self, k: int) -> _Buffers:
        """Buffers for steps of k tokens; sizes that are padded to the same tier share them."""
        n = self._padded(k)
        if n not in self._buffers:
            self._buffers[n] = self._tie(n)
        self._buffers[k] = self._buffers[n]
        return self._buffers[k]

    def _tie_prompt(self, inputs: EngineInputs) -> tuple[dict[str, Array], Call, _Buffers, int]:
        """Tie the prompt graph to the inputs of a prefill: what it computes is what the decoder reads."""
        p = self._files.prompt_rows(inputs)
        if p > self.spec.capacity:
            raise BadModel(f"a prompt of {p} rows does not fit into the cache, whose capacity is {self.spec.capacity}")
        buffers = self._tie(self._padded(p))
        arrays = {
            name: self.runtime.empty(inputs[name].shape, spec.dtype) for name, spec in self._prompt.inputs.items()
        }
        call = self._prompt.tie({**arrays, "embeds": buffers.embeds[:p]})
        return arrays, call, buffers, p

    def _tie(self, n: int) -> _Buffers:
        spec, empty = self.spec, self.runtime.empty
        arrays = {
            "embeds": empty((n, spec.hidden_width), np.float32),
            "position": empty((n,), np.int64),
            "mask": empty((1, 1, n, spec.rows), np.bool_),
            "write_index": empty((1,), np.int64),
            "logits": empty((n, spec.vocab_size), np.float32),
            "features": empty((n, spec.feature_width), np.float32),
        }
        tied = {k: v for k, v in arrays.items() if k in self._decoder.inputs or k in self._decoder.outputs}
        names = list(zip(spec.state_names, spec.new_state_names, strict=True))
        call = self._decoder.tie(tied, self._state, names)
        arrays["mask"] = arrays["mask"][0, 0]
        return _Buffers(**arrays, call=call)

    def _padded(self, n: int) -> int:
        """The smallest number of rows that the runtime can run and that holds n."""
        tiers = self.runtime.tiers
        if tiers is None:
            return n
        for tier in tiers:
            if tier >= n:
                return tier
        raise BadModel(f"{n} rows are more than the largest that was built for ({tiers[-1]}); build larger tiers")

    def _check_golden(self, golden: Mapping[str, Array], path: Path, tolerance: float | None) -> None:
        """Run the golden inputs through prefill, a chain and a tree, against what the reference computed."""
        if tolerance is None:
            tolerance = GOLDEN_TOLERANCE.get(self.runtime.precision, np.inf)
        missing = [name for name in self._prompt.inputs if name not in golden]
        if missing:
            raise BadModel(f"{path}: has no {', '.join(missing)}, which the prompt graph reads; export the model again")
        got = [self.prefill({k: golden[k] for k in self._prompt.inputs}).logits.copy()]
        # Steps that are longer than this engine's are not run.
        steps = [name for name in ("chain", "tree") if len(golden[f"{name}_tokens"]) <= self._max_step]
        for name in steps:
            got.append(self.step(golden[f"{name}_tokens"], golden[f"{name}_parents"]).logits.copy())
        wanted = [golden[f"{name}_logits"] for name in ("prefill", *steps)]
        spread = float(np.mean([w.std() for w in wanted]))
        worst = max(float(np.abs(g - w).max()) for g, w in zip(got, wanted, strict=True)) / spread
        if not (worst <= tolerance or tolerance == np.inf):
            raise BadModel(
                f"{path.parent}: golden inputs give logits {worst:.2g} of their spread away from the reference, at "
                f"most {tolerance:g} is accepted; the graphs and the weights don't belong together"
            )

    def _repeats_itself(self, golden: Mapping[str, Array]) -> bool:
        """Whether tokens scored one by one are, to the bit, what one call says about them.

        In eight bits a rounding anywhere can move an activation by a whole step: what is not equal is not nearly equal.
        """
        tokens = np.resize(golden["chain_tokens"], min(PROOF_CALLS, self._max_step)).astype(np.int32)
        self.prefill({name: golden[name] for name in self._prompt.inputs})
        at_once = self.step(tokens, self._chain[: len(tokens)]).logits.copy()
        for i in range(len(tokens)):
            if not np.array_equal(self.step(tokens[i : i + 1], self._chain[:1]).logits[0], at_once[i]):
                return False
            self.commit(np.zeros(1, np.int32))
        return True


def _let_padding_look(mask: Array, rows: int, length: int) -> None:
    """Padded rows see themselves only: a softmax over nothing would be NaN."""
    for i in range(rows, len(mask)):
        mask[i] = False
        mask[i, length + i] = True
