"""The box of a token lies on the part of the picture that the token was cut from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Look, cast, method, shared, unchanged
from PIL import Image
from torch import Tensor, nn
from zoo import FAMILIES, Family, select

import saccade as sc
from saccade.core.boxes import clip_boxes, picture_boxes, source, tower_boxes
from saccade.core.errors import InputError
from saccade.core.probe import _covered, lines, patch_lines, trace
from saccade.core.seams.discovery import discover
from saccade.core.state import Sequence, Vocabulary

Size = tuple[int, int]
Square = tuple[int, int, int, int]

WIDE, TALL = (100, 60), (60, 140)
PLACED = [
    p
    for p in (*select("vlm", "processor"), *select("encdec", "processor"))
    if "qformer" not in p.values[0].tags
]
"""Families that write of pictures and whose features have places of their own."""
FILLS = [p for p in PLACED if "cross" not in p.values[0].tags]
"""And stand in the text."""
TOWERS = [p for p in PLACED if "convolutions" not in p.values[0].tags]
"""Whose towers attend from patch to patch."""


@cache
def processor_of(name: str) -> Any:
    made = FAMILIES[name].processor
    assert made
    return made()


def gray(size: Size, square: Square | None = None) -> Image.Image:
    width, height = size
    picture = np.full((height, width, 3), 128, np.uint8)
    if square:
        x0, y0, x1, y1 = square
        picture[y0:y1, x0:x1] = (255, 0, 0)
    return Image.fromarray(picture)


def squares(size: Size, count: int) -> list[Square]:
    draw = np.random.default_rng(0)
    side = max(3, min(size) // 8)
    corners = [
        (int(draw.integers(0, size[0] - side)), int(draw.integers(0, size[1] - side))) for _ in range(count)
    ]
    return [(x, y, x + side, y + side) for x, y in corners]


def asked(f: Family, pictures: list[list[Image.Image]], **more: Any) -> dict[str, Any]:
    """What the model is given for samples of these pictures."""
    assert f.prompt
    text = [f.prompt(len(sample), "What is it, " * (1 + 2 * i)) for i, sample in enumerate(pictures)]
    several = "multi_image" in f.tags
    images = pictures if several else [picture for sample in pictures for picture in sample]
    made = dict(processor_of(f.name)(images=images, text=text, padding=True, return_tensors="pt", **more))
    return dict(cast(made, torch.float32))  # Llama 4's gives bfloat16


def features_of(model: Any, inputs: dict[str, Any], kind: str = "image") -> Tensor:
    """As the model itself gets them."""
    base = model.base_model
    if hasattr(base, "get_image_features"):
        names = {k for k in inputs if k.startswith(("pixel", "image", "video", "qformer", "batch_num"))}
        made = getattr(base, f"get_{kind}_features")(
            **{k: inputs[k] for k in names if kind[:3] in k or "pix" in k}
        )
        parts = made.last_hidden_state if made.pooler_output is None else made.pooler_output
        if "image_tokens" in made:  # codes: what they were chosen for
            parts = made.last_hidden_state.permute(0, 2, 3, 1)
    elif hasattr(base, "embed_tokens_extend"):
        seen: list[Tensor] = []
        hook = base.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(**inputs)
        hook.remove()
        parts = seen[0][inputs["input_ids"] == model.config.vision_config.image_token_id]
    elif not hasattr(base, "multi_modal_projector"):
        parts = base.vision_model(inputs["pixel_values"]).last_hidden_state
    else:
        tiles = {k: inputs[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        parts = base.multi_modal_projector(base.vision_model(**tiles).last_hidden_state)
    return torch.cat([p.reshape(-1, p.shape[-1]) for p in ([parts] if isinstance(parts, Tensor) else parts)])


@cache
def drawn_with(f: Family) -> Any:
    """Its model, whose convolutions hear little of what lies beyond the stretch of each output."""
    wide = [m for m in shared(f.name).modules() if isinstance(m, nn.Conv2d) and m.kernel_size > m.stride]
    if not wide:
        return shared(f.name)
    model = f.build()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size > module.stride:
            beyond = torch.full_like(module.weight, 0.01)
            top, left = module.padding
            beyond[:, :, top : top + module.stride[0], left : left + module.stride[1]] = 1
            module.weight.data *= beyond
    return model


@contextmanager
def deaf(model: nn.Module) -> Iterator[None]:
    """Outside its text no token hears of another, but of those that the projector pools."""

    def nothing(_: nn.Module, __: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    def same(_: nn.Module, args: Any, __: Any) -> Any:
        return args[0]

    sites = [s for s in discover(model) if s.tower not in ("text", "projector") and s.kind == "self"]
    hooks = [s.module.register_forward_hook(same if s.tower == "codes" else nothing) for s in sites]
    hooks += [m.register_forward_hook(same) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def vision_sites(model: nn.Module) -> list[Any]:
    """Its layers' attention, without that of a pooling head."""
    found = [s for s in discover(model) if s.tower == "vision" and s.kind == "self"]
    return [s for s in found if ".head." not in f"{s.path}."]


def lit_by(before: Tensor, after: Tensor, least: float = 0.05) -> Tensor:
    change = (before - after).abs().amax(-1)
    return change > least * change.max()


def overlap(boxes: Tensor, square: Square, margin: float = 0.0) -> Tensor:
    """The area that boxes, made larger by a margin, share with the square."""
    x0, y0, x1, y1 = square
    width = boxes[..., 2].clamp_max(x1 + margin) - boxes[..., 0].clamp_min(x0 - margin)
    height = boxes[..., 3].clamp_max(y1 + margin) - boxes[..., 1].clamp_min(y0 - margin)
    return (width.clamp_min(0) * height.clamp_min(0)).nan_to_num(0)


def assert_on(boxes: Tensor, lit: Tensor, square: Square, size: Size) -> None:
    """Lit is every token whose box shares much with the square, and none far from it."""
    area = (square[2] - square[0]) * (square[3] - square[1])
    assert lit[overlap(boxes, square) > 0.2 * area].all()
    assert (overlap(boxes, square, margin=0.04 * max(size))[lit] > 0).all()


# ---- every family ---------------------------------------------------------------------------------------


def test_no_family_that_reads_pictures_is_left_out() -> None:
    assert [f.name for f in FAMILIES.values() if "vlm" in f.tags and not f.processor] == []


@pytest.mark.parametrize("size", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("f", PLACED)
def test_a_red_square_changes_the_features_whose_boxes_it_meets(f: Family, size: Size) -> None:
    model, least = drawn_with(f), 0.1 if "convolutions" in f.tags else 0.05
    boxes = picture_boxes(model, processor_of(f.name), size)
    with deaf(model):
        before = features_of(model, asked(f, [[gray(size)]]))
        assert len(before) == len(boxes)
        total = 0
        for square in squares(size, 6):
            lit = lit_by(before, features_of(model, asked(f, [[gray(size, square)]])), least)
            if overlap(boxes, square).sum() > 0:  # else it was cropped away
                assert_on(boxes, lit, square, size)
                total += int(lit.sum())
        assert total >= 3


@pytest.mark.parametrize("f", TOWERS)
def test_the_same_inside_the_tower(f: Family) -> None:
    model, size = shared(f.name), WIDE
    reached: list[str] = []
    sites = vision_sites(model)
    for site in (sites[0], sites[-1]):
        seen: list[Tensor] = []

        def note(_: nn.Module, args: Any, kwargs: dict[str, Any], seen: list[Tensor] = seen) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            seen.append(states.reshape(-1, states.shape[-1]).clone())

        hook = site.module.register_forward_pre_hook(note, with_kwargs=True)
        square = (40, 20, 56, 36)
        with deaf(model):
            features_of(model, asked(f, [[gray(size)]]))
            features_of(model, asked(f, [[gray(size, square)]]))
        hook.remove()
        if not seen:  # the tower of clips
            continue
        boxes = tower_boxes(model, processor_of(f.name), size, site.name)
        assert len(boxes) == len(seen[0])
        assert_on(boxes, lit_by(*seen), square, size)
        reached.append(site.name)
    assert reached


@pytest.mark.parametrize("f", [p for p in TOWERS if p in FILLS])
def test_a_feature_is_made_of_the_tokens_inside_its_box(f: Family) -> None:
    model, processor = shared(f.name), processor_of(f.name)
    site = vision_sites(model)[-1].name  # of Video-LLaVA's two the one of pictures, or this raises
    features, tokens = picture_boxes(model, processor, WIDE), tower_boxes(model, processor, WIDE, site)
    made = source(model, processor, WIDE, site)
    assert made.shape == (len(features), len(tokens))
    placed = ~features.isnan().any(1)
    assert torch.equal(made.any(1), placed)
    assert not made[:, tokens.isnan().any(1)].any()
    for feature in placed.nonzero()[:, 0].tolist():
        parts = tokens[made[feature]]
        hull = torch.cat([parts[:, :2].amin(0), parts[:, 2:].amax(0)])
        torch.testing.assert_close(hull, features[feature], atol=0.01, rtol=0)


@pytest.mark.slow
def test_pooled_patches_that_stand_in_rows_tell_their_places_or_are_refused() -> None:
    f, grids = FAMILIES["gemma4"], []
    tell = method(features=lambda item: grids.append(item.grid()))()
    with sc.attach(shared("gemma4"), tell), torch.no_grad():
        shared("gemma4")(**f.inputs(images=(1, 2)))
    square = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert len(grids) == 3 and all(torch.equal(grid[:, 1:], square) for grid in grids)
    with sc.attach(shared("molmo2"), tell), torch.no_grad(), pytest.raises(InputError, match="no neighbours"):
        shared("molmo2")(**FAMILIES["molmo2"].inputs())


@pytest.mark.parametrize("f", select("qformer", "processor"))
def test_queries_that_read_everywhere_have_no_box(f: Family) -> None:
    boxes = picture_boxes(shared(f.name), processor_of(f.name), WIDE)
    assert boxes.shape == (8, 4)
    assert boxes.isnan().all()


# ---- by hand --------------------------------------------------------------------------------------------


def near(got: Tensor, wanted: Any, tolerance: float = 0.6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted).float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [WIDE, TALL, (30, 30), (1000, 600)])
def test_clip_cuts_the_middle_square_into_six_by_six(size: Size) -> None:
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    wanted = [
        [left + c * side / 6, top + r * side / 6, left + (c + 1) * side / 6, top + (r + 1) * side / 6]
        for r in range(6)
        for c in range(6)
    ]
    near(picture_boxes(shared("llava"), processor_of("llava"), size), wanted)


def test_llava_next_has_a_base_view_then_unpadded_rows_with_a_newline_each() -> None:
    boxes = picture_boxes(shared("llava_next"), processor_of("llava_next"), WIDE)
    near(boxes[:16], [[25 * c, 15 * r, 25 * (c + 1), 15 * (r + 1)] for r in range(4) for c in range(4)])
    rows = boxes[16:].view(4, 9, 4)
    assert rows[:, 8].isnan().all()
    scale = 39 / 60  # 100 x 60 becomes 64 x 39 in a canvas of 64 x 64, so 12 rows of padding above
    near(rows[:, :8, 0].mean(0), [12.5 * c for c in range(8)])
    near(rows[:, :8, 1].mean(1), [(16 + 8 * r - 12) / scale for r in range(4)])
    near(rows[:, :8, 3].mean(1), [(24 + 8 * r - 12) / scale for r in range(4)])


def test_internvl_ends_with_the_thumbnail() -> None:
    boxes = picture_boxes(shared("internvl"), processor_of("internvl"), WIDE).view(3, 4, 4, 4)
    for tile, left, width in ((0, 0, 50), (1, 50, 50), (2, 0, 100)):
        near(boxes[tile, :, :, 0].mean(0), [left + width / 4 * c for c in range(4)])
        near(boxes[tile, :, :, 3].mean(1), [15 * (r + 1) for r in range(4)])


@pytest.mark.slow
def test_a_tower_of_convolutions_has_a_box_of_what_lies_below_each_token() -> None:
    cells = [[25 * c, 15 * r, 25 * (c + 1), 15 * (r + 1)] for r in range(4) for c in range(4)]
    boxes = picture_boxes(shared("florence2"), processor_of("florence2"), WIDE)
    assert boxes[0].isnan().all()  # the mean of the others
    near(boxes[1:], cells)
    edges = [(5 + 2 * c) * 100 / 26 for c in range(9)]  # of 26 points the 16 in the middle, two to a code
    cells = [[edges[c], 7.5 * r, edges[c + 1], 7.5 * (r + 1)] for r in range(8) for c in range(8)]
    near(picture_boxes(shared("chameleon"), processor_of("chameleon"), WIDE), cells)


@pytest.mark.slow
def test_molmo_sees_the_whole_and_then_pairs_of_patches_across_its_crops() -> None:
    """WIDE is cut into two rows of two crops of 6 x 6 patches, which share two each way: 10 x 10."""
    boxes = picture_boxes(shared("molmo2"), processor_of("molmo2"), WIDE)
    third = 100 / 3
    near(boxes[:9], [[third * c, 20 * r, third * (c + 1), 20 * (r + 1)] for r in range(3) for c in range(3)])
    near(boxes[9:], [[20 * c, 12 * r, 20 * (c + 1), 12 * (r + 1)] for r in range(5) for c in range(5)])


def test_a_picture_beside_another_has_only_its_base_view_in_onevision() -> None:
    model, processor = shared("llava_onevision"), processor_of("llava_onevision")
    alone = picture_boxes(model, processor, WIDE)
    crowded = picture_boxes(model, processor, WIDE, crowded=True)
    assert (len(alone), len(crowded)) == (52, 17)
    assert crowded[16].isnan().all()
    near(alone[:16], [[25 * c, 15 * r, 25 * (c + 1), 15 * (r + 1)] for r in range(4) for c in range(4)])
    edges = [0, 5, 30, 55, 60]  # it stands in a square then, with 20 pixels of padding above and below
    wanted = [[25 * c, edges[r], 25 * (c + 1), edges[r + 1]] for r in range(4) for c in range(4)]
    near(crowded[:16], wanted, 1.6)  # half an element


def test_qwen_windows_are_in_the_order_of_the_model() -> None:
    from transformers.vision_utils import get_vision_window_index

    f, model = FAMILIES["qwen2_5_vl"], shared("qwen2_5_vl")
    grid = asked(f, [[gray(WIDE)]])["image_grid_thw"]
    rows, columns = grid[0, 1].item() // 2, grid[0, 2].item() // 2
    order = get_vision_window_index(grid, 2, 32, 8)[0].tolist()
    assert order != sorted(order)
    tokens = tower_boxes(model, processor_of(f.name), WIDE, "vision.1.self").view(-1, 4, 4)
    merged = torch.cat([tokens[:, :, :2].amin(1), tokens[:, :, 2:].amax(1)], -1)
    width, height = WIDE[0] / columns, WIDE[1] / rows
    wanted = [
        [c * width, r * height, (c + 1) * width, (r + 1) * height]
        for r in range(rows)
        for c in range(columns)
    ]
    near(merged, [wanted[i] for i in order])
    near(picture_boxes(model, processor_of(f.name), WIDE), wanted)


@pytest.mark.parametrize("lines", [1, 3, 4, 7, 27, 64])
def test_any_run_of_lines_is_found(lines: int) -> None:
    runs = [(a, b) for a in range(lines) for b in range(a, min(lines, a + 11))]
    covers = torch.tensor([[a <= line <= b for line in range(lines)] for a, b in runs])

    def answer(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return (covers & chosen).any(1), (chosen | ~covers).all(1)

    first, last = _covered(torch.arange(lines), answer)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == runs


# ---- clips ----------------------------------------------------------------------------------------------


def clip(square: Square | None = None, at: int = 0, frames: int = 8) -> np.ndarray:
    return np.stack([np.asarray(gray(WIDE, square if i == at else None)) for i in range(frames)])


@pytest.mark.parametrize("name", ["llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl"])
def test_a_red_square_in_one_frame_changes_the_features_of_that_frame(name: str) -> None:
    f, model, processor = FAMILIES[name], shared(name), processor_of(name)
    assert f.prompt
    boxes, frames = clip_boxes(model, processor, WIDE, 8)
    text = [f.prompt(0, "What is it?", videos=1)]
    with deaf(model):
        plain, *others = (
            features_of(model, dict(processor(videos=[made], text=text, return_tensors="pt")), "video")
            for made in (clip(), *(clip((44, 20, 60, 36), at) for at in (0, 5, 7)))
        )
    assert len(boxes) == len(plain)
    for at, marked in zip((0, 5, 7), others, strict=True):
        shown = (frames[:, 0] <= at) & (at <= frames[:, 1])
        assert_on(boxes.where(shown[:, None], torch.nan), lit_by(plain, marked), (44, 20, 60, 36), WIDE)


def test_qwen3_shows_the_frames_that_its_processor_samples() -> None:
    boxes, frames = clip_boxes(shared("qwen3_vl"), processor_of("qwen3_vl"), WIDE, 8)
    assert boxes.isfinite().all()
    assert frames.unique(dim=0).tolist() == [[0, 2], [5, 7]]


def test_a_clip_may_have_one_frame() -> None:
    boxes, frames = clip_boxes(shared("qwen2_vl"), processor_of("qwen2_vl"), WIDE, 1)
    assert boxes.isfinite().all()
    assert frames.unique().tolist() == [0]


def test_three_hundred_frames_are_told_apart() -> None:
    _, frames = clip_boxes(shared("llava_onevision"), processor_of("llava_onevision"), (32, 32), 300)
    assert frames[:-1, 0].tolist() == [frame for frame in range(300) for _ in range(4)]
    assert torch.equal(frames[:-1, 0], frames[:-1, 1])
    assert frames[-1].tolist() == [-1, -1]


# ---- located pictures in a session ----------------------------------------------------------------------


def layouts(
    model: Any, f: Family, pictures: list[list[Image.Image]], site: str, run: Callable[..., Any]
) -> Any:
    """Keys, boxes and items at a site in the first pass."""
    look = Look(sites=site, tell=lambda call: (call.k.transpose(1, 2).flatten(2), call.klayout))
    with sc.attach(model, look) as session, torch.no_grad():
        session.locate(processor_of(f.name), pictures)
        run(**asked(f, pictures, padding_side="left"))
    return look.seen[0][2]


@pytest.mark.parametrize("f", [p for p in TOWERS if p in FILLS and "multi_image" in p.values[0].tags])
def test_the_layout_knows_the_boxes_and_pictures_of_a_padded_batch(f: Family) -> None:
    """The last picture of three changes: so do the keys of its tokens, where its square is."""
    model, square = shared(f.name), (24, 64, 44, 84)
    pictures = [[gray(WIDE)], [gray(WIDE), gray(TALL)]]
    marked = [[gray(WIDE)], [gray(WIDE), gray(TALL, square)]]
    with deaf(model):
        plain, layout = layouts(model, f, pictures, "text.0.self", model)
        lit = (plain - layouts(model, f, marked, "text.0.self", model)[0]).abs().amax(-1)
    assert layout.box is not None and layout.box.shape[:2] == layout.kind.shape
    visual = layout.where("image")
    expected = [
        picture_boxes(model, processor_of(f.name), WIDE),
        picture_boxes(model, processor_of(f.name), WIDE, crowded=True),
        picture_boxes(model, processor_of(f.name), TALL, crowded=True),
    ]
    torch.testing.assert_close(layout.box[visual], torch.cat(expected), equal_nan=True)
    assert layout.box[~visual].isnan().all()
    items = [0] * len(expected[0]) + [0] * len(expected[1]) + [1] * len(expected[2])
    assert layout.item[visual].tolist() == items
    lit = lit > 0.05 * lit.max()
    second = (layout.item == 1) & (torch.arange(2)[:, None] == 1)
    assert lit.any() and second[lit].all()
    assert_on(layout.box[second], lit[second], square, TALL)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("llava_next", "text.0.self"),
        pytest.param("florence2", "text.0.cross", marks=pytest.mark.slow),
        pytest.param("phi4_multimodal", "text.0.self", marks=pytest.mark.slow),
    ],
)
def test_beams_keep_the_boxes_of_their_sample(name: str, site: str) -> None:
    f, model = FAMILIES[name], shared(name)
    pictures = [[gray(WIDE)], [gray(TALL)]]

    def run(**inputs: Any) -> Any:
        return model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)

    _, layout = layouts(model, f, pictures, site, run)
    for row, size in enumerate((WIDE, WIDE, TALL, TALL)):
        got = layout.box[row][layout.where("image")[row]]
        torch.testing.assert_close(got, picture_boxes(model, processor_of(f.name), size), equal_nan=True)


def test_mllama_keeps_boxes_with_the_keys_that_text_reads() -> None:
    f, model, square = FAMILIES["mllama"], shared("mllama"), (24, 64, 44, 84)
    pictures = [[gray(WIDE)], [gray(WIDE), gray(TALL)]]
    marked = [[gray(WIDE)], [gray(WIDE), gray(TALL, square)]]
    with deaf(model):
        plain, layout = layouts(model, f, pictures, "text.1.cross", model)
        lit = (plain - layouts(model, f, marked, "text.1.cross", model)[0]).abs().amax(-1)
    lit = lit > 0.05 * lit.max()
    each = plain.shape[1] // 2
    assert not lit[0].any() and not lit[1, :each].any()
    assert_on(layout.box[1, each:], lit[1, each:], square, TALL)
    torch.testing.assert_close(layout.box[0, :each], layout.box[1, :each], equal_nan=True)
    assert layout.box[0, each:].isnan().all()


@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3", "mllama"])
def test_a_tower_that_takes_all_tiles_at_once_has_boxes_of_its_own(name: str) -> None:
    f, model = FAMILIES[name], shared(name)
    keys, layout = layouts(model, f, [[gray(WIDE), gray(WIDE)]], "vision.1.self", model)
    assert layout.box.shape == (*keys.shape[:2], 4)
    one = tower_boxes(model, processor_of(name), WIDE, "vision.1.self")
    torch.testing.assert_close(layout.box.flatten(0, 1), torch.cat([one, one]), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("qwen2_5_omni", "text.0.self"),
        ("phi4_multimodal", "text.0.self"),
        ("chameleon", "text.0.self"),
        ("florence2", "encoder.0.self"),
        ("florence2", "text.0.cross"),
        ("blip", "text.0.cross"),
    ],
)
def test_families_of_one_picture_keep_its_boxes(name: str, site: str) -> None:
    f, model = FAMILIES[name], shared(name)
    _, layout = layouts(model, f, [[gray(WIDE)], [gray(TALL)]], site, model)
    for row, size in enumerate((WIDE, TALL)):
        expected = picture_boxes(model, processor_of(name), size)
        placed = layout.box[row].isfinite().all(-1)
        assert not (placed & ~layout.where("image")[row]).any()
        assert torch.equal(layout.box[row][placed], expected[expected.isfinite().all(-1)])


def test_boxes_stay_with_their_pictures_when_a_turn_is_not_located() -> None:
    sequence = Sequence(Vocabulary({"image": 7}, frozenset()))
    known = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    for turn, boxes in enumerate((None, [known], None)):
        ids = torch.tensor([[1, 7, 7, 2]])
        sequence.extend(ids, (1, 4), ids.device, generated=False, samples=1)
        sequence.add_items("image", [[2]], boxes)
        assert sequence.layout().item[0, turn * 4 + 1] == turn
    boxes = sequence.layout().boxes[0]
    assert torch.equal(boxes[5:7], known)
    assert boxes[[0, 1, 2, 3, 4, 7, 8, 9, 10, 11]].isnan().all()


# ---- the model is left as it was ------------------------------------------------------------------------


def test_probing_leaves_no_trace() -> None:
    f = FAMILIES["qwen2_5_vl"]
    model = f.build()
    model.train()
    model.visual.blocks[1].eval() if hasattr(model, "visual") else model.model.visual.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    with unchanged(model):
        assert picture_boxes(model, processor_of(f.name), WIDE).isfinite().all()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_in_the_tower_leaves_no_trace_and_is_no_answer() -> None:
    f = FAMILIES["llava"]
    model, calls = f.build(), []
    features_of(model, asked(f, [[gray(WIDE)]]))  # the library sets up its own hooks at the first pass
    model.train()
    layer = next(s.module for s in discover(model) if s.name == "vision.1.self")

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("no more")

    hook = layer.register_forward_hook(fail)
    with unchanged(model), pytest.raises(RuntimeError, match="no more"):
        picture_boxes(model, processor_of("llava"), WIDE)
    hook.remove()
    assert all(m.training for m in model.modules())
    assert torch.equal(
        picture_boxes(model, processor_of("llava"), WIDE),
        picture_boxes(shared("llava"), processor_of("llava"), WIDE),
    )


def test_methods_do_not_meet_the_probe() -> None:
    model = FAMILIES["llava"].build()
    look = Look(sites="*.self")
    with sc.attach(model, look) as session:
        session.locate(processor_of("llava"), [gray(WIDE)])
        assert look.seen == []


@pytest.mark.parametrize(
    "f", [p for p in FILLS if p.values[0].name in ("llava_next", "qwen2_5_vl", "idefics3", "gemma3")]
)
def test_boxes_do_not_depend_on_the_precision(f: Family) -> None:
    half = shared(f.name, torch.bfloat16)
    got = picture_boxes(half, processor_of(f.name), WIDE)
    assert torch.equal(
        got.nan_to_num(-1), picture_boxes(shared(f.name), processor_of(f.name), WIDE).nan_to_num(-1)
    )


def test_few_passes_are_needed_and_none_the_second_time() -> None:
    model = FAMILIES["llava"].build()
    calls: list[int] = []
    next(s.module for s in discover(model) if s.name == "vision.0.self").register_forward_hook(
        lambda *_: calls.append(1)
    )
    first = picture_boxes(model, processor_of("llava"), WIDE)
    assert 1 <= len(calls) <= 4 + 2 * np.log2(36)
    before = len(calls)
    first.zero_()
    assert picture_boxes(model, processor_of("llava"), WIDE)[-1, -1] > 50
    assert len(calls) == before


def test_settings_of_a_processor_that_change_are_seen() -> None:
    processor = FAMILIES["llava"].processor()
    before = picture_boxes(shared("llava"), processor, WIDE)
    processor.image_processor.do_center_crop = False
    processor.image_processor.size = {"height": 48, "width": 48}
    near(picture_boxes(shared("llava"), processor, WIDE)[-1], [100 - 100 / 6, 50, 100, 60])
    assert before[-1, 2] < 81


# ---- refusals -------------------------------------------------------------------------------------------


def test_refusals_name_cause_and_remedy() -> None:
    llava, processor = shared("llava"), processor_of("llava")
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: picture_boxes(shared("llama"), processor, WIDE), "no features of images"),
        (lambda: picture_boxes(llava, processor.tokenizer, WIDE), "makes no image"),
        (lambda: tower_boxes(llava, processor, WIDE, "text.0.self"), "No image passes text.0.self"),
        (lambda: clip_boxes(llava, processor, WIDE, 8), "no features of videos"),
    ]
    for call, problem in refused:
        with pytest.raises(InputError, match=problem):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("site", ["vision.0.self", "vision.channel_attn.0.self"])
def test_windows_that_a_layer_cuts_and_channels_are_refused(site: str) -> None:
    with pytest.raises(InputError, match="have no known places"):
        tower_boxes(shared("florence2"), processor_of("florence2"), WIDE, site)


def test_features_without_any_place_are_refused() -> None:
    model = FAMILIES["llava"].build()
    projector: Any = model.base_model.multi_modal_projector
    for told in (torch.zeros_like, lambda out: out.mean(1, keepdim=True).expand_as(out)):
        hook = projector.register_forward_hook(lambda _, __, out, told=told: told(out))
        with pytest.raises(InputError, match="No feature of images of LlavaForConditionalGeneration"):
            picture_boxes(model, processor_of("llava"), WIDE)
        hook.remove()


def test_patches_in_an_unknown_order_are_refused() -> None:
    """Four rows of four patches, pooled two by two: no neighbours when they stand in one row."""
    pixels = torch.rand(2, 16, 3, generator=torch.Generator().manual_seed(0))

    def read(values: Tensor) -> list[Tensor]:
        return [values.view(2, 2, 2, 2, 3).mean((1, 3)).flatten(0, 1)]

    with pytest.raises(InputError, match="no neighbours"):
        trace(read, *pixels, lines(pixels.shape[1:], (1, 1)))
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).flip(1)
    axes = [axis[0] for axis in patch_lines(places[None], torch.zeros(1, dtype=torch.long))]
    ((first, last, local),) = trace(read, *pixels, axes)
    assert local.all()
    assert first.tolist() == [[0, 0, 0], [0, 0, 2], [0, 2, 0], [0, 2, 2]]
    assert (last - first == torch.tensor([0, 1, 1])).all()


def test_pictures_of_another_prompt_are_refused() -> None:
    f, model = FAMILIES["llava_next"], shared("llava_next")
    with sc.attach(model, Look(sites="text.0.self")) as session:
        with pytest.raises(InputError, match="ndarray is no picture"):
            session.locate(processor_of(f.name), [np.asarray(gray(WIDE))])
        session.locate(processor_of(f.name), [gray(WIDE)])
        with pytest.raises(InputError, match="52 image tokens, the prompt has 56"):
            model.generate(**asked(f, [[gray(TALL)]]), max_new_tokens=1)
        session.locate(processor_of(f.name), [])
        model.generate(**asked(f, [[gray(TALL)]]), max_new_tokens=1)


def test_a_part_of_a_prompt_that_is_not_what_was_located_has_no_boxes() -> None:
    f, model = FAMILIES["llava_next"], shared("llava_next")
    look = Look(sites="text.0.self", tell=lambda call: call.klayout)
    with sc.attach(model, look) as session, torch.no_grad():
        session.locate(processor_of(f.name), [gray(WIDE)])
        model(**asked(f, [[gray(TALL)]]))
        model(**asked(f, [[gray(WIDE)]]))
    other, same = (layout for _, _, layout in look.seen)
    assert other.boxes.isnan().all()
    assert int(other.where("image:0").sum()) == 56
    assert int(same.boxes.isfinite().all(-1).sum()) == 48
