"""What the scores of a set of images cost: fid, kid and lpips of medgen beside torch-fidelity and lpips called directly.

The same images of 128 px, the same weights from a local file (drawn at random: they take as long as trained ones), CPU seconds of one
thread, since others on the machine cost waiting time, which does not count. Both sides make one pass of InceptionV3 over each set and one
of AlexNet over both; what the cache saves when another set is compared with the same real one is a row of its own. Memory is the
peak while a process scores N images a side, and while one scores four times as many; what loading took before is left out."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from medgen import rng
from medgen.evaluate import distances, extractors, features, lpips_distance
from medgen.evaluate.extractors import Extractor
from medgen.evaluate.features import Bench, Pictures
from medgen.evaluate.lpips_distance import Lpips
from medgen.files import sha256_file
from medgen.pretrained import torchvision_operators

PIXELS = 128
COUNT = 200  # images a side
MEMORY_COUNT = 50  # and four times as many
THREADS = 1
WANTED_SHARE = 0.75  # of the other side's seconds
KID_SUBSETS = 100  # torch-fidelity's default; of all images, as its 1000 are not there
AGREE_LPIPS = 1e-4  # largest relative difference of a mean
AGREE_FID = 0.05  # torch-fidelity resizes to other pixel centres

Seconds = dict[str, float]


# what is scored, and by which weights


def images(count: int, side: int) -> np.ndarray:
    """uint8 [count, 128, 128]: both sides read the same 8 bits."""
    generator = rng.numpy_generator(5, "benchmark_images", side)
    coarse, fine = generator.normal(size=(2, count, PIXELS, PIXELS))
    texture = 20 * gaussian_filter(coarse, (0, 8, 8)) * (1 + side / 10) + gaussian_filter(fine, (0, 1, 1))
    return np.clip(128 + 40 * texture, 0, 255).astype(np.uint8)


def inception_file(folder: Path) -> Path:
    """Weights in torch-fidelity's layout, drawn so that the features do not vanish."""
    torchvision_operators.make_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: object, *_: object) -> None:
            """Stays as it was made."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=empty)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def alexnet_file(folder: Path) -> Path:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), folder / "alexnet.pth")
    return folder / "alexnet.pth"


# the two sides


def timed(seconds: Seconds, name: str, action: Callable[[], Any]) -> Any:
    start = time.process_time()
    found = action()
    seconds[name] = time.process_time() - start
    return found


def loaded(inception: Path, alexnet: Path) -> tuple[Extractor, Lpips]:
    extractor = extractors.load({"kind": "inception", "file": str(inception), "sha256": sha256_file(inception)}, None)
    return extractor, lpips_distance.load({"net": "alex", "file": str(alexnet), "sha256": sha256_file(alexnet)})


def of_medgen(extractor: Extractor, lpips: Lpips, real: np.ndarray, synthetic: np.ndarray, cache: Path) -> tuple[dict[str, float], Seconds]:
    """Scores and the CPU seconds of each part; the kernel distance comes with its interval. What `cache` holds of the features is not computed again."""
    seconds: Seconds = {}
    every = np.arange(len(real))
    bench = Bench(cache, lambda _: None, lambda *_: None)

    def in_float(side: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return side[rows].astype(np.float32) / 255

    def features_of(side: np.ndarray) -> np.ndarray:
        pictures = Pictures(lambda rows: in_float(side, rows), lambda rows: [hashlib.sha256(side[row].tobytes()).hexdigest() for row in rows], "benchmark")
        return features.features(extractor, pictures, every, bench)

    first = timed(seconds, "features_of_real", lambda: features_of(real))
    second = timed(seconds, "features_of_synthetic", lambda: features_of(synthetic))
    fid = timed(seconds, "fid", lambda: distances.frechet(distances.moments(first, every), distances.moments(second, every)))
    kid = timed(seconds, "kid", lambda: distances.discrepancy(distances.cubic, first, second, every, every, 1, "benchmark").value)
    blocks = [every[start : start + lpips_distance.BATCH] for start in range(0, len(every), lpips_distance.BATCH)]
    apart = timed(seconds, "lpips", lambda: np.concatenate([lpips_distance.row_distances(lpips, in_float(real, some), in_float(synthetic, some)) for some in blocks]))
    return {"fid": fid, "kid": kid, "lpips": float(apart.mean())}, seconds


def of_the_packages(inception: Path, alexnet: Path, real: np.ndarray, synthetic: np.ndarray) -> tuple[dict[str, float], Seconds]:
    """As their pages say: torch-fidelity's calculate_metrics, and lpips on batches of 32 pairs."""
    from torch_fidelity import calculate_metrics

    class Slices(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, side: np.ndarray):
            self.side = side

        def __len__(self) -> int:
            return len(self.side)

        def __getitem__(self, row: int) -> torch.Tensor:
            return torch.from_numpy(self.side[row])[None].expand(3, -1, -1)

    seconds: Seconds = {}
    asked = {"fid": True, "kid": True, "kid_subsets": KID_SUBSETS, "kid_subset_size": len(real), "cuda": False, "verbose": False,
             "save_cpu_ram": True, "feature_extractor_weights_path": str(inception)}  # fmt: skip
    scores = timed(seconds, "torch_fidelity", lambda: calculate_metrics(input1=Slices(real), input2=Slices(synthetic), **asked))
    apart = timed(seconds, "lpips", lambda: direct_lpips(alexnet, real, synthetic))
    return {"fid": scores["frechet_inception_distance"], "kid": scores["kernel_inception_distance_mean"], "lpips": float(apart.mean())}, seconds


def direct_lpips(alexnet: Path, real: np.ndarray, synthetic: np.ndarray) -> torch.Tensor:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(alexnet, weights_only=True)
    model.net.load_state_dict({name: state[f"features.{name.partition('.')[2]}"] for name in model.net.state_dict()})
    found = []
    with torch.no_grad():
        for start in range(0, len(real), 32):
            both = [torch.from_numpy(side[start : start + 32])[:, None].expand(-1, 3, -1, -1).float() / 255 for side in (real, synthetic)]
            found.append(model(*both, normalize=True).flatten())
    return torch.cat(found)


def distances_of_torch_fidelity(extractor: Extractor, real: np.ndarray, synthetic: np.ndarray) -> Seconds:
    """What of its seconds is no network: its two distances on features of the same shape."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    sides = [torch.from_numpy(rng.numpy_generator(1, "benchmark_features", number).normal(size=(len(real), 2048)).astype(np.float32)) for number in (0, 1)]
    seconds: Seconds = {}
    timed(seconds, "fid", lambda: fid_statistics_to_metric(*(fid_features_to_statistics(side) for side in sides), False))
    timed(seconds, "kid", lambda: kid_features_to_metric(*sides, kid_subsets=KID_SUBSETS, kid_subset_size=len(real), verbose=False))
    return seconds


# memory


def peak_mebibytes(count: int, inception: Path, alexnet: Path) -> float:
    """While a process of its own scores `count` images a side, read from a file as an evaluation reads them."""
    code = f"from benchmarks import evaluation as e; e.scored_from_disk({count}, e.Path({str(inception)!r}), e.Path({str(alexnet)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return round(int(done.stdout.split()[-1]) / 1024, 1)


def scored_from_disk(count: int, inception: Path, alexnet: Path) -> None:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for side in (0, 1):
            path = Path(folder) / f"{side}.npy"
            stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, PIXELS, PIXELS))
            stored[:] = np.resize(images(MEMORY_COUNT, side), stored.shape)
            del stored
            sides.append(np.load(path, mmap_mode="r"))
        networks = loaded(inception, alexnet)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading, which is the highest
        of_medgen(*networks, *sides, Path(folder))
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1])


# all of it


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        inception, alexnet = inception_file(Path(folder)), alexnet_file(Path(folder))
        record = compared(inception, alexnet, Path(folder))
        peaks = {str(count): peak_mebibytes(count, inception, alexnet) for count in (MEMORY_COUNT, 4 * MEMORY_COUNT)}
    torch.set_num_threads(threads)
    return {**record, "peak_memory_mebibytes_by_images_a_side": peaks, "features_of_the_difference_mebibytes": round(2 * 3 * MEMORY_COUNT * 2048 * 4 / 2**20, 1)}


def compared(inception: Path, alexnet: Path, cache: Path) -> dict[str, Any]:
    real, synthetic = images(COUNT, 0), images(COUNT, 1)
    before = os.getloadavg()
    extractor, lpips = loaded(inception, alexnet)
    scores, seconds = of_medgen(extractor, lpips, real, synthetic, cache)
    _, later = of_medgen(extractor, lpips, real, images(COUNT, 2), cache)  # another set against the same reference
    their_scores, their_seconds = of_the_packages(inception, alexnet, real, synthetic)
    differences = {name: abs(scores[name] - their_scores[name]) / abs(their_scores[name]) for name in scores}
    if differences["lpips"] > AGREE_LPIPS or differences["fid"] > AGREE_FID:
        raise SystemExit(f"the sides differ: medgen {scores}, the packages {their_scores}; a ratio of times would mean nothing")
    total, theirs = sum(seconds.values()), sum(their_seconds.values())
    outside = distances_of_torch_fidelity(extractor, real, synthetic)
    passes = seconds["features_of_real"] + seconds["features_of_synthetic"]
    their_passes = their_seconds["torch_fidelity"] - sum(outside.values())
    return {
        "images_a_side": COUNT, "pixels": PIXELS, "threads": THREADS, "load_average_before": before, "load_average_after": os.getloadavg(),
        "relative_differences": {name: float(f"{value:.1e}") for name, value in differences.items()},
        "cpu_seconds": {"medgen": rounded(seconds), "packages": rounded(their_seconds), "torch_fidelity_distances": rounded(outside)},
        "total": {"medgen": round(total, 2), "packages": round(theirs, 2), "share": round(total / theirs, 3), "wanted_share": WANTED_SHARE},
        "features_alone": {"medgen": round(passes, 2), "packages": round(their_passes, 2), "share": round(passes / their_passes, 3)},
        "networks_alone": {"share": round((passes + seconds["lpips"]) / (their_passes + their_seconds["lpips"]), 3)},
        "another_set_against_the_same_real_one": {"medgen": round(sum(later.values()), 2), "share": round(sum(later.values()) / theirs, 3)},
    }


def rounded(seconds: Seconds) -> Seconds:
    return {name: round(value, 2) for name, value in seconds.items()}
