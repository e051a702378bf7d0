"""Selections to time and to compare: each method's own step on random tokens, and its plain reference on the same tensors.

The step is the one that the engine runs, on a hand-made View: `Method.steps(geometry)`, then `step.select(view)`. What an encoder or an LLM computes
anyway (rows of attention of CLS, keys, values) is given to both sides; FastV and PyramidDrop make their one row from a query and keys on both sides.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtr.bench import plain, plain_inside
from vtr.engine.signals import Tap, llm_signal
from vtr.engine.tokens import Places
from vtr.registry import create_method
from vtr.types import Geometry, PerToken, Selection, Step, Text, View

WORDS, REMAINING = 40, 10
"""Text tokens behind the image; tower layers still to come where FlowCut is timed."""
Found = Tensor | tuple[Tensor, Tensor]


@dataclass
class Given:
    """Random tensors of `batch` images of `views` views of `grid` tokens: 48 prototypes and noise, so that some tokens are alike.

    Args:
        views, batch: of an image; how many images.
        keep: tokens left of an image, a multiple of `views`.
        grid: rows and columns of a view.
        width, heads: of the tokens.
        device, dtype: of the tokens.
    """

    views: int
    batch: int
    keep: int
    grid: tuple[int, int] = (24, 24)
    width: int = 1024
    heads: int = 16
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def area(self) -> int:
        """Tokens of a view."""
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        """Tokens of an image."""
        return self.views * self.area

    def normal(self, name: str, *shape: int) -> Tensor:
        """The tensor of a name, made once."""
        if name not in self.made:
            dice = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.batch)
            self.made[name] = torch.randn(*shape, generator=dice).to(self.device, self.dtype)
        return self.made[name]

    @cached_property
    def tokens(self) -> Tensor:
        """`(B, N, D)`."""
        dice = torch.Generator().manual_seed(self.count + self.batch)
        which = torch.randint(48, (self.batch, self.count), generator=dice)
        noise = torch.randn(self.batch, self.count, self.width, generator=dice)
        return (torch.randn(48, self.width, generator=dice)[which] + 0.7 * noise).to(self.device, self.dtype)

    def by_head(self, name: str, *before: int) -> Tensor:
        """`(*before, H, d)`."""
        return self.normal(name, *before, self.width).unflatten(-1, (self.heads, -1))

    def row(self, name: str, rows: int) -> Tensor:
        """Attention `(rows, N * B / rows)` float32 of one query, mean over heads."""
        return self.normal(name, self.batch, self.count).float().view(rows, -1).mul(1.5).softmax(-1)

    @property
    def text(self) -> Tensor:
        """`(B, M, D)`."""
        return self.normal("text", self.batch, WORDS, self.width)

    def geometry(self, grid: tuple[int, int] | None = None) -> Geometry:
        """A model with a tower of 24 layers with CLS and an LLM of 32."""
        return Geometry("bench", 24, 22, 1, True, grid or self.grid, 32, self.count, anyres=self.views > 1)

    def view(self, by_view: bool = False, keep: int | None = None, tokens: Tensor | None = None) -> View:
        """One row per image, or per view with its share of `keep`."""
        rows, n = (self.batch * self.views, self.area) if by_view else (self.batch, self.count)
        wanted = (self.keep if keep is None else keep) // (self.views if by_view else 1)
        row = torch.arange(self.batch, device=self.device).repeat_interleave(rows // self.batch)
        cells = torch.cartesian_prod(torch.arange(self.views), torch.arange(self.grid[0]), torch.arange(self.grid[1])).to(self.device)
        cells = cells.expand(self.batch, -1, -1).reshape(rows, n, 3)
        return View(
            tokens=(self.tokens if tokens is None else tokens).view(rows, n, -1),
            real=torch.ones(rows, n, dtype=torch.bool, device=self.device),
            keep=torch.full((rows,), wanted, device=self.device),
            counts=[n] * rows,
            keeps=[wanted] * rows,
            most=wanted,
            row=row,
            cells=cells,
            patch=torch.arange(self.count, device=self.device).expand(self.batch, -1).reshape(rows, n),
            grids=[[self.grid] * self.views] * rows,
            crop_grids=[(2, 2) if self.views == 5 else (0, 0)] * rows,
            image_sizes=[(0, 0)] * rows,
            sizes=torch.ones(rows, n, device=self.device),
            checksum=row,
            only=list(range(self.views)) * self.batch if by_view else None,
            text=Text(self.text[row], *torch.ones(2, rows, WORDS, dtype=torch.bool, device=self.device)),
        )


@dataclass(frozen=True)
class Case:
    """One selection on some tensors.

    Args:
        ours: runs the method's step on all rows.
        plain: runs the plain reference on one row, or on all where `together`.
        rows: how many there are.
        map_bytes: of the full attention map in float32 that the authors' way reads, 0 where it reads none.
    """

    ours: Callable[[], Selection]
    plain: Callable[[int], Found]
    rows: int
    map_bytes: int = 0
    together: bool = False

    def run_plain(self) -> list[Found]:
        """Runs the plain reference on everything."""
        return [self.plain(row) for row in range(1 if self.together else self.rows)]


def _step(name: str, given: Given, place: int = -1, grid: tuple[int, int] | None = None, **settings: Any) -> Step:
    """The step at some place of the list of a method."""
    return create_method(name, keep=given.keep, **settings).steps(given.geometry(grid))[place]


def _case(given: Given, step: Step, view: View, values: Sequence[Any], one: Callable[[int], Found], maps: int = 0) -> Case:
    """A case whose signals are `values` in the order of the step's needs; `maps` counts attention maps of views."""
    view.signals = dict(zip(step.needs, values, strict=True))
    select = step.select
    assert select is not None
    size = given.batch * given.views * given.heads * (given.area + 1) ** 2 * 4 * maps
    return Case(lambda: select(view), one, len(view.counts), size)


def divprune(given: Given) -> Case:
    view = given.view()
    return _case(given, _step("divprune", given), view, (), lambda g: plain.divprune(view.tokens[g], view.keeps[g]))


def visionzip(given: Given) -> Case:
    view = given.view(by_view=True)
    keys, row = given.by_head("keys", len(view.counts), given.area), given.row("cls", len(view.counts))
    contextual = round(view.most * 10 / 64)
    one = lambda g: plain.visionzip(view.tokens[g], keys[g], row[g], view.most, contextual)  # noqa: E731
    return _case(given, _step("visionzip", given), view, (keys, row), one, maps=1)


def vispruner(given: Given) -> Case:
    view = given.view(by_view=True)
    row = given.row("cls", len(view.counts))
    return _case(given, _step("vispruner", given), view, (row,), lambda g: plain.vispruner(view.tokens[g], row[g], view.most), maps=1)


def cdpruner(given: Given) -> Case:
    view = given.view()
    tokens = view.tokens.unflatten(1, (given.views, -1))
    return _case(given, _step("cdpruner", given), view, (), lambda g: plain.cdpruner(tokens[g], given.text[g], given.keep))


def prumerge(given: Given) -> Case:
    view = given.view(by_view=True)
    rows, width = len(view.counts), given.width
    query, keys = given.normal("query", rows, width) * 0.5, given.normal("all keys", rows, 1 + given.area, width)
    query_heads, key_heads = (part.unflatten(-1, (given.heads, -1)) for part in (query, keys))
    logits = torch.einsum("ghd,gnhd->ghn", query_heads, key_heads) * (width // given.heads) ** -0.5
    values = logits[..., 1:], logits.softmax(-1)[..., 1:], key_heads[:, 1:].contiguous()
    one = lambda g: plain.prumerge(view.tokens[g], query[g], keys[g], view.most)  # noqa: E731
    return _case(given, _step("prumerge", given), view, values, one, maps=1)


def flowcut(given: Given) -> Case:
    step, view = _step("flowcut", given, 1 + 22 - 1 - REMAINING), given.view()
    rows, before = given.row("cls", given.batch * given.views), given.row("cls before", given.batch * given.views)
    rows, before = rows.view(given.batch, -1), before.view(given.batch, -1)
    values, cls = given.by_head("values", given.batch, given.count) * 0.2, given.by_head("cls value", given.batch, given.views) * 0.2
    view.memory["keep"] = view.keep
    target = given.keep // 2 if given.views > 1 else given.keep
    by_view = lambda part: part.unflatten(0, (given.views, -1))  # noqa: E731

    def select() -> Selection:
        view.per_token["flowcut"] = before
        return step.select(view)  # type: ignore[misc]

    one = lambda g: plain_inside.flowcut(by_view(rows[g]), cls[g], by_view(values[g]), by_view(before[g]), target, REMAINING)[0]  # noqa: E731
    case = _case(given, step, view, (rows, values, cls), one, maps=1)
    return Case(select, case.plain, case.rows, case.map_bytes)


def hired(given: Given) -> Case:
    view = given.view()
    late, early = given.row("late", given.batch * given.views), given.row("early", given.batch * given.views)
    late, early = late.view(given.batch, -1), early.view(given.batch, -1)
    views = late.unflatten(1, (given.views, -1))
    one = lambda g: plain.hired(views[g], early[g, : given.area], (2, 2), given.keep)  # noqa: E731
    return _case(given, _step("hired", given), view, (early, late) if given.views > 1 else (late,), one, maps=2)


def globalcom2(given: Given) -> Case:
    view, score = given.view(), given.normal("logits", given.batch, given.count).float()
    views = score.unflatten(1, (given.views, -1))
    return _case(given, _step("globalcom2", given), view, (score,), lambda g: plain.globalcom2(views[g], (2, 2), given.keep), maps=1)


def todre(given: Given) -> Case:
    view, row = given.view(), given.row("cls", given.batch * given.views).view(given.batch, -1)
    one = lambda g: plain.todre(view.tokens[g], row[g, : given.area], view.most)  # noqa: E731
    return _case(given, _step("todre", given, 0), view, (row,), one, maps=1)


def scope(given: Given) -> Case:
    view = given.view(by_view=True)
    row = given.row("cls", len(view.counts))
    return _case(given, _step("scope", given), view, (row,), lambda g: plain.scope(view.tokens[g], row[g], view.most), maps=1)


def mmtok(given: Given) -> Case:
    view = given.view(by_view=True)
    features, text = given.normal("features", *view.tokens.shape), view.text
    view.per_token["features"] = features
    assert text is not None
    one = lambda g: plain.mmtok(view.tokens[g], features[g], text.tokens[g], view.most)  # noqa: E731
    return _case(given, _step("mmtok", given), view, (), one)


def hiprune(given: Given) -> Case:
    view = given.view(by_view=True)
    view.cells = view.cells * torch.tensor([0, 1, 1], device=given.device)
    middle, deep = given.row("middle", len(view.counts)), given.row("deep", len(view.counts))
    one = lambda g: plain.hiprune(middle[g], deep[g], given.grid, view.most)  # noqa: E731
    return _case(given, _step("hiprune", given), view, (middle, deep), one, maps=2)


def vscan(given: Given) -> Case:
    """What the boundary leaves; the row in the LLM is FastV's."""
    view = given.view(by_view=True)
    view.cells = view.cells * torch.tensor([0, 1, 1], device=given.device)
    shallow, deep = given.row("shallow", len(view.counts)), given.row("cls", len(view.counts))
    one = lambda g: plain.vscan(view.tokens[g], shallow[g], deep[g], given.grid, view.most)  # noqa: E731
    return _case(given, _step("vscan", given, ratio=1.0), view, (shallow, deep), one, maps=2)


def holov(given: Given) -> Case:
    view, row = given.view(), given.row("cls", given.batch)
    return _case(given, _step("holov", given), view, (row,), lambda g: plain.holov(row[g], view.most), maps=1)


def prunesid(given: Given) -> Case:
    view = given.view(by_view=True)
    row = given.row("cls", len(view.counts))
    return _case(given, _step("prunesid", given), view, (row,), lambda g: plain.prunesid(view.tokens[g], row[g], view.most), maps=1)


def tome(given: Given) -> Case:
    remove, rows = given.count * 17 // 576, given.grid[0] * given.views
    view, metric = given.view(keep=given.count - remove), given.by_head("keys", given.batch, given.count)
    step = _step("tome", given, 0, (rows, given.grid[1]))

    def all_of_them(_: int) -> Found:
        cls = lambda part: torch.cat([part[:, :1] * 0, part], 1)  # noqa: E731
        tokens, sizes = cls(view.tokens), cls(view.sizes)[..., None]
        sizes[:, 0] = 1
        merged, _, kept = plain_inside.tome(tokens, cls(metric.mean(2)), sizes, remove)  # type: ignore[assignment]
        kept, order = kept.sort(1)
        return kept[:, 1:] - 1, merged.gather(1, order[:, 1:, None].expand(-1, -1, merged.shape[2]))

    def select() -> Selection:
        view.per_token.pop("number", None)
        return step.select(view)  # type: ignore[misc]

    case = _case(given, step, view, (metric,), all_of_them)
    return Case(select, case.plain, case.rows, together=True)


def fastv(given: Given) -> Case:
    step, view = _step("fastv", given), given.view()
    length = 35 + given.count + WORDS
    query, key = given.by_head("query", given.batch, length).transpose(1, 2), given.by_head("key", given.batch, length).transpose(1, 2)
    key = key.contiguous()  # as a KV cache has them
    column = torch.arange(length, device=given.device).expand(given.batch, -1)
    there, visual = torch.ones_like(column, dtype=torch.bool), column[:, 35 : 35 + given.count]
    tap = Tap(Places(column, there, torch.where((column >= 35) & (column < 35 + given.count), column, -1), whole=True), query, key)
    tap.scaling = query.shape[-1] ** -0.5

    def select() -> Selection:
        view.signals = {step.needs[0]: llm_signal(step.needs[0], tap, visual, column[:, -WORDS:], view.row, None, True)}
        return step.select(view)  # type: ignore[misc]

    one = lambda g: plain_inside.fastv(query[g, :, -1], key[g], 35, given.count, view.most)  # noqa: E731
    return Case(select, one, given.batch, given.batch * given.heads * length**2 * 4)


def pyramiddrop(given: Given) -> Case:
    view = given.view(keep=given.count // 2)
    query, key = (PerToken(given.by_head(n, given.batch, given.count), given.by_head(f"{n} of text", given.batch, WORDS)) for n in "qk")
    one = lambda g: plain_inside.pyramiddrop(query.text[g, -1], key.visual[g], key.text[g], view.most)  # noqa: E731
    return _case(given, _step("pyramiddrop", given), view, (query, key), one)


def v2drop(given: Given) -> Case:
    step, view, entered = _step("v2drop", given), given.view(), given.normal("entered", given.batch, given.count, given.width)

    def select() -> Selection:
        view.per_token["entered"] = entered
        return step.select(view)  # type: ignore[misc]

    return Case(select, lambda g: plain_inside.v2drop(entered[g], view.tokens[g], view.most), given.batch)


def dart(given: Given) -> Case:
    view = given.view()
    view.final_norm = lambda tokens: tokens
    key = PerToken(given.by_head("k", given.batch, given.count), given.by_head("k of text", given.batch, WORDS))
    one = lambda g: plain_inside.dart(view.tokens[g], key.visual[g].flatten(1), given.text[g], key.text[g].flatten(1), view.most)  # noqa: E731
    return _case(given, _step("dart", given), view, (key,), one)


def sparsevlm(given: Given) -> Case:
    view, here = given.view(), given.normal("here", given.batch, given.count, given.width)
    raters, stage = create_method("sparsevlm", keep=given.keep).steps(given.geometry())[:2]
    rows = given.normal("rows", given.batch, WORDS, given.count).float().softmax(-1)
    given.tokens.mul_(0.05)  # raw products of embeddings go through a softmax
    view.signals = {stage.needs[0]: rows}

    def select() -> Selection:
        view.tokens = given.tokens
        raters.select(view)  # type: ignore[misc]
        view.tokens = here
        return stage.select(view)  # type: ignore[misc]

    one = lambda g: plain_inside.sparsevlm(given.tokens[g], given.text[g], rows[g], here[g], view.most)  # noqa: E731
    return Case(select, one, given.batch, given.batch * given.heads * (given.count + WORDS + 35) ** 2 * 4)


CASES: Mapping[str, Callable[[Given], Case]] = {
    case.__name__: case
    for case in (
        *(divprune, visionzip, vispruner, cdpruner, prumerge, flowcut, hired, globalcom2, dart, tome, fastv, pyramiddrop, sparsevlm),
        *(todre, scope, mmtok, hiprune, holov, prunesid, v2drop, vscan),
    )
}
"""Methods with a plain reference."""
ONLY_CROPS = {"globalcom2"}
"""Those that leave images of one view as they are."""
