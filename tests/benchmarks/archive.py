"""What every contender is given: seeded JPEGs in tar shards, and one file of weights; nothing here is measured.

    python -m tests.benchmarks.archive weights NETWORK SIDE FOLDER     (a process of its own: it loads TensorFlow)

The archive is 500 distinct photos of 500 x 375 (crops of the twelve of scikit-image, flipped and jittered; quality 90,
4:2:0) that are repeated, in another order, in shards of 500 under distinct keys. Shape letters: B images, S side in
pixels.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from jobs.demo_images import PHOTOS

WIDTH_PX, HEIGHT_PX = 500, 375
JPEG_QUALITY = 90
SHARD_IMAGES = 500
SEED = 2
LITE0 = "efficientnet_lite0"
CALIBRATION_IMAGES = 32
BRANCH_SHARE = 0.1  # of a residual branch's gammas and betas


def make_archive(folder: Path, num_images: int) -> Path:
    """The folder of an archive of `num_images`, made if it is not there: `images-<n>/00000.tar` and so on."""
    archive = folder / f"images-{num_images}"
    pool = None
    for shard, first in enumerate(range(0, num_images, SHARD_IMAGES)):
        path = archive / f"{shard:05d}.tar"
        if not path.exists():
            archive.mkdir(parents=True, exist_ok=True)
            pool = pool or make_jpegs(SHARD_IMAGES)
            _write_shard(path, pool, shard, min(SHARD_IMAGES, num_images - first))
    return archive


def make_jpegs(count: int) -> list[bytes]:
    """`count` JPEG files, the photos taking turns; the same Pillow makes the same bytes."""
    random = np.random.Generator(np.random.PCG64(SEED))
    photos = [Image.open(str(files("skimage") / "data" / name)).convert("RGB") for name in PHOTOS.values()]
    return [_jpeg(photos[number % len(photos)], random) for number in range(count)]


def read_shard(path: Path) -> Iterator[tuple[str, bytes]]:
    """(key, JPEG) of a shard made here: plain USTAR with short names, which takes a tenth of the time of tarfile."""
    with open(path, "rb") as file:
        while name := (header := file.read(512))[:100].rstrip(b"\0"):
            size = int(header[124:135], 8)
            content = file.read(size)
            file.seek(-size % 512, os.SEEK_CUR)
            if name.endswith(b".jpg"):
                yield name[:-4].decode(), content


def weights(name: str, side_px: int, folder: Path) -> Path:
    """A weights file of one network, without its top, made if it is not there.

    Kernels are Keras's random ones, seeded. Every BatchNormalization gets gammas and betas in the range of trained
    networks, and the statistics of a batch of the archive's images, jittered: left as Keras makes them (mean 0,
    variance 1, gamma 1, beta 0) there would be nothing to multiply or add, and graphs would be faster than real ones.
    Those that end a residual branch are smaller, or the network would be one that no training leaves: it magnified
    the rounding of bfloat16 to cosines of 0.994 (MobileNetV2) and 0.998 (ResNet50). MobileNetV2 keeps the contract
    (0.9993, the least of 1,024 images), EfficientNetB0 does not (0.9968).
    EfficientNet-Lite0 has those of ImageNet, from the package index: bfloat16 keeps a cosine of 0.981 there, and is
    refused.

    Raises:
        ValueError: the network answers with numbers that are not finite, or with the same for every image.
    """
    path = folder / f"{name}-{side_px}.weights.h5"
    if path.exists():
        return path
    import keras

    from engine.backbones.efficientnet_lite0 import load_package_weights

    keras.utils.set_random_seed(SEED)
    network = build_network(name, side_px)
    pixels_BSS3 = _calibration_pixels(side_px)
    scaled_BSS3 = preprocess_input(name)(pixels_BSS3.copy())
    if name == LITE0:
        load_package_weights(network)
    else:
        _randomise_normalisation(network, scaled_BSS3)
    embeddings_BD = np.asarray(network(scaled_BSS3, training=False))
    spread = embeddings_BD.std(axis=0).mean() / np.abs(embeddings_BD).mean()
    if not (np.isfinite(embeddings_BD).all() and spread > 0.05):
        raise ValueError(
            f"{name}: random weights make useless embeddings (spread between images {spread:.3g})"
        )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    network.save_weights(unfinished)
    unfinished.rename(path)
    return path


def backbone_block(name: str, side_px: int, weights: Path) -> dict[str, Any]:
    """The engine's recipe block for the same network."""
    kind = {"kind": LITE0} if name == LITE0 else {"kind": "keras_application", "name": name}
    return {**kind, "weights": str(weights), "input_size": side_px}


def build_network(name: str, side_px: int) -> Any:
    """keras.Model without its top, random weights: scaled (B, S, S, 3) -> (B, D); of keras.applications, or Lite0."""
    import keras

    if name == LITE0:
        from engine.backbones.efficientnet_lite0 import build_lite0

        network = build_lite0(side_px)
        pooled = keras.layers.GlobalAveragePooling2D()(network.output)
        return keras.Model(network.input, pooled, name=network.name)
    return getattr(keras.applications, name)(
        include_top=False, weights=None, pooling="avg", input_shape=(side_px, side_px, 3)
    )


def preprocess_input(name: str) -> Any:
    """The function that scales pixels 0..255 for this network, as keras.applications does."""
    import keras

    if name == LITE0:
        from engine.backbones.efficientnet_lite0 import PIXEL_SCALING

        return PIXEL_SCALING.apply
    constructor = getattr(keras.applications, name)
    return getattr(keras.applications, constructor.__module__.rsplit(".", 1)[1]).preprocess_input


def _jpeg(photo: Image.Image, random: np.random.Generator) -> bytes:
    """One crop of 4:3 and of a half to all of the photo's width or height."""
    width = random.uniform(0.5, 1.0) * min(photo.width, photo.height * WIDTH_PX / HEIGHT_PX)
    height = width * HEIGHT_PX / WIDTH_PX
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    crop = photo.resize(
        (WIDTH_PX, HEIGHT_PX), Image.Resampling.BICUBIC, (left, top, left + width, top + height)
    )
    if random.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        crop = enhancer(crop).enhance(random.uniform(0.8, 1.2))
    encoded = io.BytesIO()
    crop.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return encoded.getvalue()


def _write_shard(path: Path, pool: list[bytes], shard: int, count: int) -> None:
    order = np.random.Generator(np.random.PCG64([SEED, shard])).permutation(len(pool))[:count]
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, number in enumerate(order):
            for ending, content in ((".jpg", pool[number]), (".cls", str(number % len(PHOTOS)).encode())):
                entry = tarfile.TarInfo(f"{shard:05d}-{place:05d}{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    unfinished.rename(path)


def _calibration_pixels(side_px: int) -> np.ndarray:
    """float32 0..255, shape (B, S, S, 3)."""
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in make_jpegs(CALIBRATION_IMAGES)]
    return np.stack([np.asarray(image.resize((side_px, side_px)), np.float32) for image in images])


def _randomise_normalisation(network: Any, scaled_BSS3: np.ndarray) -> None:
    import keras

    random = np.random.Generator(np.random.PCG64(SEED))
    layers = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    ending = set(_ending_a_branch(network))
    for layer in layers:
        share = BRANCH_SHARE if layer.name in ending else 1.0
        layer.gamma.assign(share * random.uniform(0.5, 1.5, layer.gamma.shape))
        layer.beta.assign(share * random.normal(0.0, 0.3, layer.beta.shape))
        layer.momentum = 0.0  # the moving statistics become those of the next batch
    network(scaled_BSS3, training=True)
    for layer in layers:
        deviation = np.sqrt(np.asarray(layer.moving_variance) + layer.epsilon)
        shift = random.normal(0.0, 0.1, deviation.shape) * deviation
        layer.moving_mean.assign(np.asarray(layer.moving_mean) + shift)
        layer.moving_variance.assign(
            np.asarray(layer.moving_variance) * random.uniform(0.8, 1.25, deviation.shape)
        )


def _ending_a_branch(network: Any) -> Iterator[str]:
    """Names of the BatchNormalizations whose output is added to what goes around their branch."""
    import keras

    place = {layer.name: number for number, layer in enumerate(network.layers)}
    for add in network.layers:
        if isinstance(add, keras.layers.Add):
            before = [tensor._keras_history.operation for tensor in add.input]
            # EfficientNet drops whole branches in training, right before the sum.
            before = [
                layer.input._keras_history.operation if isinstance(layer, keras.layers.Dropout) else layer
                for layer in before
            ]
            yield max(
                (layer.name for layer in before if isinstance(layer, keras.layers.BatchNormalization)),
                key=place.__getitem__,
            )


if __name__ == "__main__":
    command, network_name, side, target = sys.argv[1:]
    if command != "weights":
        raise SystemExit(f"unknown command {command!r}; there is: weights NETWORK SIDE FOLDER")
    print(weights(network_name, int(side), Path(target)))
