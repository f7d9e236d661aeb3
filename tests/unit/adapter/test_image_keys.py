"""Two images behind equal image tokens never meet: with vLLM's own description of items.

The negative control is a key of tokens alone, by which the second image would be served the KV of
the first.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from kvproto.prefix import prefix_hashes
from kvserver_vllm.chain import Chain
from tests.support.scheduler_world import BLOCK, FakeRequest

TEXT, IMAGE, TOKENS = 150, 200, 600
IMAGE_TOKEN = 7


def request_with(image: str) -> FakeRequest:
    """Text, an image of that content hash, text."""
    place = PlaceholderRange(offset=TEXT, length=IMAGE)
    feature = MultiModalFeatureSpec(
        data=None, modality="image", identifier=image, mm_position=place
    )
    request = FakeRequest(image, TOKENS, mm_features=[feature])
    request.all_token_ids[TEXT : TEXT + IMAGE] = [IMAGE_TOKEN] * IMAGE
    return request


def keys(image: str) -> list[bytes]:
    """The prompt's keys, the last one its tail's."""
    chain = Chain(request_with(image), BLOCK, b"")
    chain.extend_to_tail()
    return [*chain.hashes, chain.tail]


def keys_of_tokens(image: str) -> list[bytes]:
    """Negative control: keys that know nothing of images."""
    return prefix_hashes(request_with(image).all_token_ids, BLOCK, tail=True)


def shared(one: list[bytes], other: list[bytes]) -> int:
    """Leading blocks that the second prompt would be served from the first."""
    pairs = zip(one, other, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(one))


def test_equal_tokens_of_two_images_meet_before_the_image_only() -> None:
    cat, dog = keys("cat"), keys("dog")
    assert len(cat) == TOKENS // BLOCK + 1
    assert shared(cat, keys("cat")) == len(cat)
    assert shared(cat, dog) == TEXT // BLOCK == 1
    assert not set(cat[1:]) & set(dog[1:])


def test_keys_of_tokens_alone_would_serve_the_other_image() -> None:
    cat, dog = keys_of_tokens("cat"), keys_of_tokens("dog")
    assert shared(cat, dog) == len(cat) > TEXT // BLOCK
    assert shared(cat, keys("cat")) == TEXT // BLOCK, "the adapter's keys are others"
