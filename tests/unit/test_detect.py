"""Detection: rendered faces are found, borders move no landmarks, and facenet-pytorch agrees."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

import cv2
import numpy as np
import pytest
import torch
from facenet_pytorch import MTCNN
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torchvision.ops import nms

from agr_ray.data.rendered import render_chip, render_photograph
from agr_ray.errors import ConfigError
from agr_ray.openvino_extra import core
from agr_ray.vision.detect import DETECTORS, Detector, make_detector
from agr_ray.vision.detectors import mtcnn as cascade
from agr_ray.vision.detectors import mtcnn_nets as nets
from agr_ray.vision.detectors import mtcnn_openvino
from agr_ray.vision.faces import Faces

NUM_CHIPS = 12
SIDE_PX = 200
BORDER_PX = 50


@pytest.fixture(scope="module")
def chips() -> list[np.ndarray]:
    return [np.asarray(render_chip(0, index).image_rgb) for index in range(NUM_CHIPS)]


@cache
def mtcnn() -> Detector:
    return make_detector("mtcnn", min_face_px=40)


def with_border(chip: np.ndarray) -> np.ndarray:
    return np.pad(chip, ((BORDER_PX, BORDER_PX), (BORDER_PX, BORDER_PX), (0, 0)))


def central(faces: Faces, side_px: int) -> int:
    return faces.nearest_centre(side_px, side_px)


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Return the intersection over union of two boxes."""
    inner = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None).prod()
    return float(inner / ((box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - inner))


def test_rendered_faces_are_found(chips: list[np.ndarray]) -> None:
    assert sum(len(faces) > 0 for faces in mtcnn().detect(chips)) >= 0.9 * len(chips)


def test_landmarks_do_not_move_when_a_border_is_added(chips: list[np.ndarray]) -> None:
    moves = []
    bordered_chips = [with_border(chip) for chip in chips]
    for plain, bordered in zip(mtcnn().detect(chips), mtcnn().detect(bordered_chips), strict=True):
        if len(plain) and len(bordered):
            there = bordered.landmarks[central(bordered, SIDE_PX + 2 * BORDER_PX)] - BORDER_PX
            moves.append(np.linalg.norm(plain.landmarks[central(plain, SIDE_PX)] - there, axis=1).mean())
    assert len(moves) >= 0.9 * len(chips)
    assert np.median(moves) < 1.5
    assert max(moves) < 3.5


def test_a_face_cut_by_the_border_is_detected_as_if_padded_with_black(chips: list[np.ndarray]) -> None:
    # Cut at the temples, so that the face's box reaches beyond the chip.
    tight = [np.ascontiguousarray(chip[20:-20, 35:-35]) for chip in chips]
    moves = []
    for plain, bordered in zip(mtcnn().detect(tight), mtcnn().detect([with_border(c) for c in tight]), strict=True):
        if len(plain) and len(bordered):
            moves.append(np.linalg.norm(plain.landmarks[0] - (bordered.landmarks[0] - BORDER_PX), axis=1).mean())
    assert len(moves) >= 0.7 * len(chips)
    assert np.median(moves) < 2


def test_facenet_pytorch_agrees_on_images_with_a_border(chips: list[np.ndarray]) -> None:
    reference = MTCNN(keep_all=True, min_face_size=40, post_process=False)
    overlaps, distances = [], []
    for chip, faces in zip(chips, mtcnn().detect(chips), strict=True):
        boxes, _, landmarks = reference.detect(with_border(chip), landmarks=True)
        if boxes is None or len(faces) == 0:
            continue
        boxes, landmarks = boxes.astype(float) - BORDER_PX, landmarks.astype(float) - BORDER_PX
        ours = central(faces, SIDE_PX)
        theirs = int(np.argmax([overlap(faces.boxes_xyxy[ours], box) for box in boxes]))
        overlaps.append(overlap(faces.boxes_xyxy[ours], boxes[theirs]))
        distances.append(np.linalg.norm(faces.landmarks[ours] - landmarks[theirs], axis=1).mean())
    assert len(overlaps) >= 0.9 * len(chips)
    assert min(overlaps) >= 0.8
    assert np.median(distances) < 3


@torch.inference_mode()
def test_every_level_on_the_sheet_gives_the_same_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in [(701, 500), (90, 333), (64, 64)]]
    sheet, tiles = cascade._sheet([cascade._halved(image) for image in images], 20.0)
    assert len(sheet) > 2 * cascade._STRIP_HEIGHT_PX  # levels lie across strips
    assert {tile.owner for tile in tiles} == {0, 1, 2}
    monkeypatch.setattr(nets, "has_bfloat16", lambda device: False)
    cells, scores, regressions = cascade._candidates(nets.TorchNets(), sheet, 0.0)
    numbers = cascade._tile_numbers(tiles, sheet.shape)[cells[:, 0], cells[:, 1]]
    for number, tile in enumerate(tiles):
        level = sheet[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        padded = np.pad(level, ((6, 6), (6, 6), (0, 0)))
        expected_regressions, expected = PNet()(nets_pixels(padded[None]))
        assert scores[numbers == number] == pytest.approx(expected[0, 1].flatten(), abs=1e-4)
        expected_regressions = expected_regressions[0].flatten(1).T
        torch.testing.assert_close(regressions[numbers == number], expected_regressions, atol=1e-4, rtol=1e-4)


def test_crops_come_from_the_halving_nearest_in_size_and_are_black_outside() -> None:
    images = [cascade._halved(np.random.default_rng(n).integers(1, 256, (300, 202, 3), np.uint8)) for n in range(2)]
    squares = [(10, 21, 34, 45), (8, 16, 104, 112), (9, 15, 106, 112), (-12, -12, 12, 12), (190, 290, 214, 314)]
    squares += [(400, 0, 424, 24), (0, 0, 800, 800), (-14, -10, 82, 86)]
    owners = [0, 1, 1, 0, 1, 0, 1, 0]
    crops, rounded = cascade._cut(images, torch.tensor(squares).float(), torch.tensor(owners), 24)
    quarter = images[1][2]
    assert np.array_equal(crops[0], images[0][0][21:45, 10:34])
    assert np.array_equal(crops[1], quarter[4:28, 2:26])
    assert np.array_equal(crops[2], quarter[4:28, 2:26])
    assert np.array_equal(crops[3][12:, 12:], images[0][0][:12, :12])
    assert not crops[3][:12].any()
    assert not crops[3][:, :12].any()
    assert np.array_equal(crops[4][:10, :12], images[1][0][290:, 190:])
    assert not crops[4][10:].any()
    assert not crops[4][:, 12:].any()
    assert not crops[5].any()
    assert crops[6][:8, :6].all()  # from the smallest halving, of 18 x 12 pixels
    assert not crops[6][10:].any()
    assert np.array_equal(crops[7][2:, 4:], images[0][2][:22, :20])
    # Squares are on whole pixels of their halving.
    whole = [*squares[:2], (8, 16, 104, 112), *squares[3:7], (-16, -8, 80, 88)]
    assert rounded.tolist() == [list(square) for square in whole]
    finely, _ = cascade._cut(images, torch.tensor(squares).float(), torch.tensor(owners), 24, finely=True)
    averaged = cv2.resize(images[1][1][8:56, 4:52], (24, 24), interpolation=cv2.INTER_AREA)
    assert np.array_equal(finely[1], averaged)


@torch.inference_mode()
def test_the_other_nets_equal_facenet_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nets, "has_bfloat16", lambda device: False)
    ours = nets.TorchNets()
    for run, theirs, side_px in ((ours.refine, RNet, 24), (ours.output, ONet, 48)):
        crops = np.random.default_rng(1).integers(0, 256, (5, side_px, side_px, 3), np.uint8)
        for one, other in zip(run(crops), theirs()(nets_pixels(crops)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_proposals_in_int8_are_almost_those_in_float(chips: list[np.ndarray]) -> None:
    # P-Net proposes windows of 12 pixels.
    strip = cv2.resize(np.concatenate(chips, axis=1), None, fx=0.15, fy=0.15, interpolation=cv2.INTER_AREA)
    exact, rounded = (each.propose(strip, 0.0) for each in (nets.TorchNets(), mtcnn_openvino.OpenVinoNets()))
    assert torch.equal(exact[0], rounded[0])
    assert (exact[1] > 0.6).sum() > 10
    difference = (exact[1] - rounded[1]).abs()
    assert 0 < difference.mean() < 0.05
    faces = exact[1] > 0.6
    assert (exact[2] - rounded[2])[faces].abs().mean() < 0.02


@torch.inference_mode()
def test_the_other_nets_in_int8_are_almost_those_in_float(
    chips: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (nets, mtcnn_openvino):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    exact_nets, rounded_nets = nets.TorchNets(), mtcnn_openvino.OpenVinoNets()
    corners = [chip[:60, :60] for chip in chips]
    for name, side_px in (("refine", 24), ("output", 48)):
        images = [cv2.resize(each, (side_px, side_px), interpolation=cv2.INTER_AREA) for each in (*chips, *corners)]
        exact, rounded = (getattr(each, name)(np.stack(images)) for each in (exact_nets, rounded_nets))
        is_face = exact[-1][:, 1] > 0.5
        assert is_face[: len(chips)].all()
        assert is_face[len(chips) :].sum() < 4
        for one, other in zip(exact, rounded, strict=True):
            assert 1e-4 < (one - other).abs().mean() < 0.03


def test_pooling_by_four_convolutions_changes_nothing() -> None:
    openvino, weights = mtcnn_openvino.import_openvino(), nets.read_weights("pnet")
    pixels, maps = mtcnn_openvino._input((1, 50, 64, 3))
    pooled = mtcnn_openvino._pooled_convolution(maps, weights)
    plain = mtcnn_openvino._features(maps, weights, (2,), mtcnn_openvino._P_NET_RANGES[:1])
    network = core().compile_model(openvino.Model([pooled.output(0), plain], [pixels]), "CPU")
    strip = np.random.default_rng(0).integers(0, 256, (1, 50, 64, 3), np.uint8)
    one, other = network(strip).values()
    assert one.shape == (1, 10, 24, 31)
    np.testing.assert_array_equal(one, other)


GRAPHS: Final = {
    "p_net": lambda: mtcnn_openvino._proposal_net(202, 128),
    "r_net": mtcnn_openvino._refine_net,
    "o_net": mtcnn_openvino._output_net,
}
NUM_CONVOLUTIONS: Final = {"p_net": 8, "r_net": 3, "o_net": 4}


@pytest.mark.parametrize(("name", "num_convolutions"), NUM_CONVOLUTIONS.items())
def test_the_convolutions_are_in_int8(name: str, num_convolutions: int) -> None:
    network = core().compile_model(GRAPHS[name](), "CPU").get_runtime_model()
    inputs = [
        node.input(0).get_element_type().get_type_name()
        for node in network.get_ordered_ops()
        if node.get_rt_info()["layerType"] == "Convolution"
    ]
    assert inputs == ["u8"] * num_convolutions


@pytest.mark.parametrize(("name", "num_convolutions"), NUM_CONVOLUTIONS.items())
def test_weights_in_int8_are_small_enough_for_a_cpu_without_vnni(name: str, num_convolutions: int) -> None:
    # Without VNNI, a pair of products is added in 16 bits: 2 x 255 x 64 fits, 2 x 255 x 127 does not.
    num_kernels = 0
    for node in GRAPHS[name]().get_ordered_ops():
        if node.get_type_name() == "FakeQuantize" and node.input_value(0).get_node().get_type_name() == "Constant":
            weights, low, high = (node.input_value(place).get_node().data for place in range(3))
            assert (low == -high).all()
            assert np.abs(weights / high * 127).max() < 64
            num_kernels += 1
    assert num_kernels == num_convolutions


def test_only_the_latest_sizes_of_strips_are_kept() -> None:
    nets_in_openvino = mtcnn_openvino.OpenVinoNets()
    for width in range(64, 64 * 20, 64):
        nets_in_openvino.propose(np.zeros((202, width, 3), np.uint8), 0.6)
    assert nets_in_openvino._p_net.cache_info().currsize == 12


def test_a_process_that_no_longer_needs_openvino_still_gets_signals() -> None:
    code = (
        "import gc, signal; from agr_ray.vision.detect import make_detector; detector = make_detector('mtcnn_int8'); "
        "del detector; gc.collect(); signal.signal(signal.SIGTERM, lambda *_: print('stopping')); "
        "signal.raise_signal(signal.SIGTERM)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "stopping\n"


@pytest.mark.parametrize("name", ["mtcnn", "mtcnn_int8"])
def test_threads_may_share_a_detector(name: str, chips: list[np.ndarray]) -> None:
    detector = make_detector(name)
    (expected,) = detector.detect(chips[:1])
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: detector.detect(chips[:1])[0], range(12)))
    assert [faces.boxes_xyxy.tolist() for faces in found] == [expected.boxes_xyxy.tolist()] * 12


def test_the_cascade_in_int8_finds_the_same_faces(chips: list[np.ndarray]) -> None:
    images = [*chips, *(np.asarray(render_photograph(0, index, 640, 480, 4).image_rgb) for index in range(4))]
    num_faces, moves = 0, []
    for exact, rounded in zip(mtcnn().detect(images), make_detector("mtcnn_int8").detect(images), strict=True):
        assert abs(len(exact) - len(rounded)) <= 1
        for box, landmarks in zip(exact.boxes_xyxy, exact.landmarks, strict=True):
            overlaps = [overlap(box, other) for other in rounded.boxes_xyxy]
            if max(overlaps, default=0.0) > 0.8:
                moved = np.linalg.norm(landmarks - rounded.landmarks[int(np.argmax(overlaps))], axis=1).mean()
                moves.append(moved / (box[2:] - box[:2]).mean())
            num_faces += 1
    assert len(moves) >= 0.95 * num_faces > 20
    assert 0 < np.median(moves) < 0.01


def test_a_detector_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^vision\.detector mtcnn_int8: .*openvino"):
        make_detector("mtcnn_int8")


@pytest.mark.parametrize(("size", "side_px"), [(2, 7), (2, 8), (3, 7), (3, 8)])
def test_pooling_equals_torchs(size: int, side_px: int) -> None:
    maps = torch.randn(2, 5, side_px, side_px + 1, generator=torch.Generator().manual_seed(0))
    pool = torch.nn.MaxPool2d(size, 2, ceil_mode=True)
    assert torch.equal(nets.MaxPool(size)(maps), pool(maps))


def nets_pixels(images_nhwc: np.ndarray) -> torch.Tensor:
    return ((torch.from_numpy(images_nhwc).float() - 127.5) / 128).permute(0, 3, 1, 2)


def test_a_much_larger_face_is_found_at_the_same_place(chips: list[np.ndarray]) -> None:
    large = [cv2.resize(chip, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC) for chip in chips[:6]]
    moves = []
    for plain, enlarged in zip(mtcnn().detect(chips), mtcnn().detect(large), strict=False):
        if len(plain) and len(enlarged):
            there = enlarged.landmarks[central(enlarged, 6 * SIDE_PX)] / 6
            moves.append(np.linalg.norm(plain.landmarks[central(plain, SIDE_PX)] - there, axis=1).mean())
    assert len(moves) >= 5
    assert np.median(moves) < 1.5


def test_a_face_cut_by_the_border_is_found_at_most_sizes(chips: list[np.ndarray]) -> None:
    cut = [np.ascontiguousarray(chip[:, :140]) for chip in chips]
    scaled = [cv2.resize(chip, None, fx=factor, fy=factor) for chip in cut for factor in (0.8, 1.0, 1.3, 1.7, 2.3)]
    found = make_detector("mtcnn", min_score=0.9).detect(scaled)
    assert sum(len(faces) > 0 for faces in found) >= 0.9 * len(scaled)


@pytest.mark.parametrize("name", ["mtcnn", "mtcnn_int8"])
def test_the_faces_of_an_image_do_not_depend_on_the_others_of_its_batch(name: str) -> None:
    # Low thresholds: many candidates overlap by almost the limit, and many scores are equal.
    detector = make_detector(name, min_face_px=20, min_score=0.3)
    images = [np.asarray(render_chip(0, index).image_rgb) for index in range(12)]
    images += [np.asarray(render_photograph(0, index, 560 + 40 * index, 420, 3).image_rgb) for index in range(8)]
    rng = np.random.default_rng(0)
    images = [np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8) for image in images]
    alone = [faces for image in images for faces in detector.detect([image])]
    assert sum(map(len, alone)) > len(images)
    for _ in range(3):
        order = rng.permutation(len(images))
        together = dict(zip(order.tolist(), detector.detect([images[index] for index in order]), strict=True))
        for index, faces in enumerate(alone):
            other = together[index]
            assert len(faces) == len(other)
            # To the last bits only: without bfloat16, the sums of a matrix product depend on the number of its rows.
            np.testing.assert_allclose(other.scores, faces.scores, rtol=0, atol=1e-5)
            np.testing.assert_allclose(other.boxes_xyxy, faces.boxes_xyxy, rtol=0, atol=1e-2)
            np.testing.assert_allclose(other.landmarks, faces.landmarks, rtol=0, atol=1e-2)


def test_scaling_leads_to_original_pixels(chips: list[np.ndarray]) -> None:
    faces = mtcnn().detect(chips[:1])[0]
    scaled = faces.scaled(2.5)
    assert scaled.boxes_xyxy == pytest.approx(faces.boxes_xyxy * 2.5)
    assert scaled.landmarks == pytest.approx(faces.landmarks * 2.5)
    assert (scaled.scores == faces.scores).all()


def test_a_high_minimum_score_leaves_no_face(chips: list[np.ndarray]) -> None:
    assert sum(map(len, make_detector("mtcnn", min_score=1.1).detect(chips[:3]))) == 0


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("shape", [(64, 96, 3), (1, 1, 3), (5, 300, 3)])
def test_no_face_is_found_in_an_image_without_one(name: str, shape: tuple[int, int, int]) -> None:
    (faces,) = make_detector(name).detect([np.full(shape, 128, np.uint8)])
    assert len(faces) == 0
    assert faces.boxes_xyxy.shape == (0, 4)
    assert faces.landmarks.shape == (0, 5, 2)


@pytest.mark.parametrize("name", DETECTORS)
def test_no_images_give_no_predictions(name: str) -> None:
    detector = make_detector(name)
    assert detector.name == name
    assert detector.detect([]) == []


def test_haar_finds_boxes_without_landmarks(chips: list[np.ndarray]) -> None:
    found = [faces for faces in make_detector("haar").detect(chips) if len(faces)]
    assert len(found) >= 0.5 * len(chips)
    assert all(np.isnan(faces.landmarks).all() for faces in found)


def test_an_unknown_detector_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'dlib'; choose one of: mtcnn, mtcnn_int8, haar, none"):
        make_detector("dlib")


def test_faces_are_sorted_by_score() -> None:
    faces = Faces.sorted_by_score(np.array([[0, 0, 10, 10], [80, 80, 120, 120]]), np.array([0.1, 0.9]))
    assert faces.scores.tolist() == pytest.approx([0.9, 0.1])
    assert faces.boxes_xyxy[0].tolist() == [80, 80, 120, 120]
    assert faces.nearest_centre(20, 20) == 1
    assert faces.nearest_centre(200, 200) == 0


def test_nothing_is_left_to_autograd(chips: list[np.ndarray]) -> None:
    assert torch.is_grad_enabled()
    mtcnn().detect(chips[:1])
    assert torch.is_grad_enabled()


def test_suppression_keeps_the_boxes_that_torchvision_keeps_in_each_group() -> None:
    generator = torch.Generator().manual_seed(0)
    corners, sides = (low + high * torch.rand(300, 2, generator=generator) for low, high in ((0, 200), (10, 50)))
    boxes, groups = torch.cat([corners, corners + sides], dim=1), torch.arange(300) // 150 * 2  # group 1 is empty
    scores = (0.5 + 0.5 * torch.rand(300, generator=generator)).mul(10).round() / 10  # many are equal
    scores[150] = 1.0  # so that the first box of group 2 is kept

    kept = cascade._suppress(boxes, scores, groups, 0.5)

    first, second = nms(boxes[:150], scores[:150], 0.5), 150 + nms(boxes[150:], scores[150:], 0.5)
    assert kept.tolist() == [*first.tolist(), *second.tolist()]
    assert len(kept) < 300
    assert cascade._suppress(boxes[:0], scores[:0], groups[:0], 0.5).tolist() == []


def test_windows_that_overlap_by_exactly_the_limit_are_kept_at_every_scale(
    chips: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.tensor([[left, 0.0, left + 12.0, 12.0] for left in (100.0, 104.0, 106.0)])
    scores, group = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.long)
    assert cascade._suppress(windows, scores, group, 0.5).tolist() == [0, 1]

    given: list[torch.Tensor] = []
    suppress = cascade._suppress
    monkeypatch.setattr(cascade, "_suppress", lambda boxes, *rest: given.append(boxes) or suppress(boxes, *rest))
    mtcnn().detect(chips[:1])
    assert len(given[0]) > 10
    assert (given[0][:, 2:] - given[0][:, :2]).eq(12.0).all()
    assert given[0].equal(given[0].round())
