"""Images and text → what a LLaVA takes, without torchvision, which transformers' own processor needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.images import ImageProcessor


@dataclass(frozen=True)
class VisualProcessor:
    """A tokenizer and an image processor, called like transformers' LlavaProcessor.

    Args:
        tokenizer: knows the placeholder as one token.
        image_processor: makes squares of one size; another size by ``dataclasses.replace`` or ``size=``.
        image_token: the placeholder. One in the text stands for one image, and becomes a token for each patch.
    """

    tokenizer: Any
    image_processor: ImageProcessor = field(default_factory=ImageProcessor)
    image_token: str = "<image>"

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    def __call__(
        self, images: Any = None, text: Any = None, *, return_tensors: str = "pt", size: int | None = None
    ) -> Any:
        """``input_ids`` and ``attention_mask``, padded on the left, and ``pixel_values`` if there are images.

        Args:
            images: one or several of what `models.images.preprocess` takes, in the order of their placeholders.
            text: a prompt or several.
            return_tensors: "pt".
            size: pixels a side, if not the image processor's.

        Raises:
            ThriftError: no text, or not one placeholder for each image.
        """
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise ThriftError(f"there is no text: give text='{self.image_token} question', one for each prompt")
        data: dict[str, Any] = {}
        given = 0
        patches = 0
        if images is not None:
            settings = {} if size is None else {"size": size}
            data = dict(self.image_processor(images, return_tensors=return_tensors, **settings))
            given, _, height, width = data["pixel_values"].shape
            patches = (height // self.image_processor.patch) * (width // self.image_processor.patch)
        asked = sum(one.count(self.image_token) for one in texts)
        if asked != given:
            raise ThriftError(f"{asked} {self.image_token} in the text but {given} images: put one for each image")
        texts = [one.replace(self.image_token, self.image_token * patches) for one in texts]
        encoded = self.tokenizer(texts, return_tensors=return_tensors, padding=True, return_token_type_ids=False)
        return BatchEncoding({**encoded, **data}, tensor_type=None)

    def decode(self, ids: Any, **options: Any) -> str:
        return str(self.tokenizer.decode(ids, **options))

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        return list(self.tokenizer.batch_decode(ids, **options))
