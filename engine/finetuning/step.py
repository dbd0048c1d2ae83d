"""Optimizer steps of a backbone and its head together, under a strategy. Not for: which images go into them.

Shape letters: B images that a worker hands in with padding, R replicas that it hands them to, C places of a global
batch, P images of one portion of a replica's share, S side in pixels, D embedding width, K classes, L dropouts of the
head, W numbers of its widest layer, H of one of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.backbones.base import PixelScaling
from engine.finetuning.augment import Augmenter
from engine.finetuning.kinds import FinetuneTrainingConfig
from engine.finetuning.order import Feed
from engine.heads.base import Head
from engine.training.step import cross_entropies, draws

Step = Callable[[int, Feed], tf.Tensor]
IMAGES_AT_ONCE = 64  # where nothing is learnt
LOSS_SCALE = 2.0**15  # of a mean loss, at the beginning; Keras' and others' default
LOSS_SCALES = (1.0, 2.0**24)  # Keras has no bounds: it would halve down to 0, by which gradients are divided


@dataclass(frozen=True, slots=True)
class Classifier:
    """A backbone with a head on it; both were made in the strategy's scope.

    Attributes:
        scaling: of byte pixels.
        backbone: keras.Model, scaled pixels (B, S, S, 3) -> embeddings (B, D); its layers say what of it learns.
        head, head_network: (B, D) float32 -> (B, K) logits.
    """

    scaling: PixelScaling
    backbone: keras.Model
    head: Head
    head_network: keras.Model

    @property
    def learning(self) -> list[Any]:
        """Variables that a step changes: of the backbone, then of the head."""
        return [*self.backbone.trainable_variables, *self.head_network.trainable_variables]

    @property
    def tensors(self) -> list[Any]:
        """All variables; Keras' random seeds apart."""
        return [*self.backbone.weights, *self.head_network.weights]

    def embeddings(self, pixels_BSS3: tf.Tensor) -> tf.Tensor:
        """Of float32 pixels 0..255: as the backbone answers, BatchNorm by its stored statistics, nothing dropped."""
        return tf.cast(self.backbone(self.scaling.apply(pixels_BSS3), training=False), tf.float32)


def compile_embed(
    backbone: keras.Model, scaling: PixelScaling
) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """A function of uint8 (B, S, S, 3) -> float32 (B, D), for any B; weights that it is given later are used then."""

    def block(pixels_BSS3: tf.Tensor) -> tf.Tensor:
        return tf.cast(backbone(scaling.apply(tf.cast(pixels_BSS3, tf.float32)), training=False), tf.float32)

    compiled = tf.function(block, reduce_retracing=True)

    def embed(pixels_BSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
        starts = range(0, len(pixels_BSS3), IMAGES_AT_ONCE)
        found = [
            compiled(tf.constant(pixels_BSS3[start : start + IMAGES_AT_ONCE])).numpy() for start in starts
        ]
        return np.concatenate([*found, np.empty((0, backbone.output_shape[-1]), np.float32)])

    return embed


def with_loss_scale(
    optimizer: keras.Optimizer, batch_size: int, growth_steps: int = 2000
) -> keras.optimizers.LossScaleOptimizer:
    """An optimizer for gradients of float16, of which small ones would be 0; call it inside the strategy's scope.

    The loss is multiplied by a power of two before gradients are taken, and they are divided by it after. Where one
    comes out infinite or NaN the step is skipped and the factor halved: weights, moments and the number of steps that
    the learning rate goes by stay as they are. It doubles after `growth_steps` steps in a row without that.

    Args:
        batch_size: losses of a step that are summed; the first factor is that much smaller than it is for a mean.

    Source:
        Micikevicius et al., 2018, Mixed Precision Training.
    """
    first = LOSS_SCALE / 2 ** math.ceil(math.log2(batch_size))
    return keras.optimizers.LossScaleOptimizer(
        optimizer, initial_scale=max(LOSS_SCALES[0], first), dynamic_growth_steps=growth_steps
    )


def overflows_unscaled(optimizer: keras.Optimizer) -> bool:
    """Whether the last step was skipped with the least factor that there is."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return False
    scale, taken_since = float(optimizer.dynamic_scale.numpy()), int(optimizer.step_counter.numpy())
    return scale <= LOSS_SCALES[0] and not taken_since


def compile_step(
    strategy: tf.distribute.Strategy,
    classifier: Classifier,
    optimizer: keras.Optimizer,
    augmenter: Augmenter,
    config: FinetuneTrainingConfig,
    most_images: int,
) -> Step:
    """Compile one optimizer step.

    Args:
        most_images: of a global batch, over all workers.

    Returns:
        step(number, feed) -> loss of the global batch, in nats, not yet waited for. `number` counts from 0 over the
        whole training: with the seed, and with an image's place in the global batch, it decides what augmentation and
        dropout do. Loss and gradients are sums over all replicas of all workers divided by the weight of the whole
        batch, so the trace of losses hangs neither on how many replicas there are, nor on which of them an image is
        handed to, nor on how many images a device takes at once; but for mixup and cutmix, which mix an image with the
        next of those that its worker hands in. With an optimizer of `with_loss_scale` a step whose gradients are not
        finite changes nothing but the factor.
    """
    head = classifier.head

    def count(feed: Feed) -> int:
        """C, with the padding of whoever hands in all images."""
        return max(most_images, math.prod(feed.weights_RB.shape))

    def replica_step(feed: Feed, draws_CLW: tf.Tensor, drawn: dict[str, Any]) -> tf.Tensor:
        context, (replicas, share) = tf.distribute.get_replica_context(), feed.weights_RB.shape
        first = (context.replica_id_in_sync_group % replicas) * share
        at_once = min(share, config.images_at_once or share)
        weights_B, in_batch_B = (
            tf.reshape(given, [replicas * share]) for given in (feed.weights_RB, feed.places_RB)
        )
        # A worker that has none in this batch has one that counts nothing.
        real = tf.maximum(tf.reduce_sum(tf.cast(weights_B > 0, tf.int32)), 1)
        variables = classifier.learning

        def seen(places_P: tf.Tensor) -> tf.Tensor:
            pixels = tf.cast(tf.gather(feed.pixels_BSS3, places_P), tf.float32)
            return augmenter.change(pixels, drawn, tf.gather(in_batch_B, places_P), count(feed))

        def losses(places_P: tf.Tensor) -> tf.Tensor:
            images_PSS3, wanted_P = seen(places_P), tf.gather(feed.targets_B, places_P)
            in_batch_P = tf.gather(in_batch_B, places_P)
            if augmenter.mixes:  # with the image that comes next
                others_P = tf.math.floormod(places_P + 1, real)
                images_PSS3, own_P = augmenter.mix(images_PSS3, seen(others_P), drawn, in_batch_P)
            embeddings_PD = classifier.embeddings(tf.stop_gradient(images_PSS3))

            def drop(numbers_PH: tf.Tensor, which: int) -> tf.Tensor:
                kept = tf.gather(draws_CLW, in_batch_P)[:, which, : numbers_PH.shape[1]] >= head.dropouts.rate
                return tf.where(kept, numbers_PH / (1 - head.dropouts.rate), 0.0)

            logits_PK = head.training_logits(classifier.head_network, embeddings_PD, drop)
            losses_P = cross_entropies(logits_PK, wanted_P, config.label_smoothing)
            if augmenter.mixes:
                others = cross_entropies(
                    logits_PK, tf.gather(feed.targets_B, others_P), config.label_smoothing
                )
                losses_P = own_P * losses_P + (1 - own_P) * others
            return losses_P * tf.gather(weights_B, places_P)

        def portion(places_P: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                summed = tf.reduce_sum(losses(places_P))
                scaled = _scaled(optimizer, summed)
            # A custom head may have variables that its logits do not use.
            found = tape.gradient(scaled, variables, unconnected_gradients="zero")
            return summed, [tf.convert_to_tensor(gradient) for gradient in found]

        loss, gradients = portion(first + tf.range(at_once))
        for begin in range(at_once, share, at_once):
            # What is left at the end may be smaller, so no loop of the graph; each waits for the one before.
            with tf.control_dependencies([loss]):
                places_P = first + tf.range(begin, min(begin + at_once, share))
                added, more = portion(places_P)
            loss, gradients = loss + added, [one + other for one, other in zip(gradients, more, strict=True)]
        gradients = context.all_reduce(
            tf.distribute.ReduceOp.SUM,
            [tf.math.divide_no_nan(gradient, feed.weight) for gradient in gradients],
        )
        if config.clip_norm is not None:
            # Where one of them is not finite all become NaN.
            gradients, _ = tf.clip_by_global_norm(gradients, _scaled(optimizer, config.clip_norm))
        # The optimizer sums over replicas once more.
        gradients = [one / context.num_replicas_in_sync for one in gradients]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return tf.math.divide_no_nan(loss, feed.weight)

    def global_step(number: tf.Tensor, feed: Feed) -> tf.Tensor:
        drawn = augmenter.draw(count(feed), feed.pixels_BSS3.shape[1], number)
        dropouts = head.dropouts
        draws_CLW = tf.reshape(
            draws(tf.zeros((1, count(feed))), dropouts.count, dropouts.width, config.seed, number),
            (count(feed), dropouts.count, dropouts.width if dropouts.count else 0),
        )
        found = strategy.run(replica_step, args=(feed, draws_CLW, drawn))
        _bound_scale(optimizer)
        return strategy.reduce("SUM", found, axis=None)

    compiled_step = tf.function(global_step)

    def step(number: int, feed: Feed) -> tf.Tensor:
        return compiled_step(tf.constant(number, tf.int64), Feed(*(tf.constant(given) for given in feed)))

    return step


def _scaled(optimizer: keras.Optimizer, value: Any) -> Any:
    """A loss, or a norm of gradients, as an optimizer of `with_loss_scale` wants it; else as it is."""
    return (
        optimizer.scale_loss(value) if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else value
    )


def _bound_scale(optimizer: keras.Optimizer) -> None:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scale = optimizer.dynamic_scale
        scale.assign(tf.clip_by_value(tf.convert_to_tensor(scale), *LOSS_SCALES))
