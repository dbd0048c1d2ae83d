"""Embeddings of labelled images, and how well a classifier does on some of them, whichever worker has them.

Shape letters: N images, V of them that are judged, D embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.finetuning.loop import Images, Watch
from engine.finetuning.step import Classifier, compile_embed
from engine.heads.network import compile_logits
from engine.training import metrics
from engine.training.multi_label import share_right
from engine.training.step import cross_entropies

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
IMAGES_AT_ONCE = 1024  # that are read from the disk for judging


def embedded(embed: Embed, images: Images, labelled: NDArray[np.int64]) -> NDArray[np.float32]:
    """(N, D) of some labelled images; no more of them are in memory at once than are computed on.

    Where images are split between workers each computes its own, and all must call this.
    """
    own = images.own(labelled)
    own_ND = _own_embedded(embed, images, labelled[own])
    if images.are_everywhere:
        return own_ND
    embeddings_ND = np.zeros((len(labelled), own_ND.shape[1]), np.float32)
    embeddings_ND[own] = own_ND
    return images.summed(embeddings_ND)


def watch_of(
    classifier: Classifier, images: Images, validation: NDArray[np.int64], label_smoothing: float
) -> Watch:
    """Loss and accuracy on the validation images with the weights that there are. The loss is the one that is trained:
    without its label smoothing the confident head of the first phase would look better than what follows it.

    Where images are split between workers each adds up its own, and sums are divided once.
    """
    embed = compile_embed(classifier.backbone, classifier.scaling)
    logits = compile_logits(classifier.head_network)
    own = validation[images.own(validation)]
    wanted = images.targets_N[own]

    def watch() -> tuple[float, ...]:
        if not len(validation):
            return ()
        loss, right = 0.0, 0.0
        if len(own):
            found_VK = logits(_own_embedded(embed, images, own))
            losses_V = cross_entropies(tf.constant(found_VK), tf.constant(wanted), label_smoothing)
            loss = float(np.sum(losses_V, dtype=np.float64))
            right = len(own) * (share_right if wanted.ndim == 2 else metrics.accuracy)(found_VK, wanted)
        sums = images.summed(np.array([loss, right]))
        return tuple((sums / len(validation)).tolist())

    return watch


def _own_embedded(embed: Embed, images: Images, labelled: NDArray[np.int64]) -> NDArray[np.float32]:
    portions = [
        embed(images.pixels(labelled[start : start + IMAGES_AT_ONCE]))
        for start in range(0, max(1, len(labelled)), IMAGES_AT_ONCE)
    ]
    return np.concatenate(portions)
