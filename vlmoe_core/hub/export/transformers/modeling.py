"""The models of an exported repository: the encoder, and what stands on it in each task.

Axis letters: S sequences, X examples, I images, P patches, D width, A labels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from vlmoe_core.hub.export.transformers.configuration import VLMoEConfig
from vlmoe_core.hub.export.transformers.outputs import VLMoEMaskedOutput, VLMoEOutput, VLMoERetrievalOutput
from vlmoe_core.hub.export.transformers.packing import Texts, pack
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoded, Encoder
from vlmoe_core.objectives.heads import ContrastHead, MaskedHeads, pool_cls
from vlmoe_core.tasks.heads import answer_head, choose, class_head, pictures_head, pool, sentence_head

IGNORED = -100
"""A label that does not count, as everywhere in transformers."""
ALIGNMENT = 64
"""Bytes of which the address of torch's own tensors is a multiple."""


class VLMoEPreTrainedModel(PreTrainedModel):
    """The encoder under the names of the package's weights. Padding never reaches a feed-forward network or router."""

    config_class = VLMoEConfig
    main_input_name = "pixel_values"
    _no_split_modules = ("Block",)

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        # Read here and not in VLMoEConfig: transformers loads that file and this one as two packages.
        self.encoder = Encoder(ModelConfig.model_validate(config.encoder), config.vocab_size)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the weights then lie in memory as torch's own, on which the last bits depend."""
        loaded = super().from_pretrained(*args, **kwargs)
        realign(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def post_init(self) -> None:
        """Keep the initialisation of the constructors, and the tensors that are one."""
        for parameter in self.parameters():
            parameter._is_hf_initialized = not parameter.is_meta
        names = self.state_dict().keys()
        self._tied_weights_keys = {
            name: owner for name, owner in self.config.tied.items() if name in names and owner in names
        }
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """A head that the weights lack: normal weights and zero biases."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.encoder.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def encode(
        self, texts: Texts | None, pixel_values: Tensor | None, bool_masked_pos: Tensor | None = None
    ) -> Encoded:
        """The encoding of images alone, of texts alone, or of pairs."""
        encoded: Encoded = self.encoder(pack(texts, pixel_values, bool_masked_pos, self.encoder.config))
        return encoded


def realign(model: nn.Module) -> None:
    """Copy the parameters that begin where a file happened to have them.

    A product of one row takes another path on a CPU where the weights are not aligned, with other rounding.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


class VLMoEModel(VLMoEPreTrainedModel):
    """The encoder alone."""

    _keys_to_ignore_on_load_unexpected = (r"^(head|heads|contrast|match)\.",)

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Any,
    ) -> VLMoEOutput:
        """Encode images, texts, or images with their texts."""
        texts = None if input_ids is None else Texts.of(input_ids, attention_mask, token_type_ids)
        encoded = self.encode(texts, pixel_values, bool_masked_pos)
        image = None if pixel_values is None else encoded.image_states_IND
        text = None if texts is None else texts.padded(encoded.text_states_TD)
        states = [part for part in (image, text) if part is not None]
        return VLMoEOutput(
            last_hidden_state=torch.cat(states, dim=1),
            pooler_output=encoded.text_cls_SD if image is None else encoded.image_cls_ID,
            image_hidden_state=image,
            text_hidden_state=text,
        )


class VLMoEForChoice(VLMoEPreTrainedModel):
    """The encoder and a head that chooses a label of each example."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.head = self.build_head(config)
        self.post_init()

    def build_head(self, config: VLMoEConfig) -> nn.Module:
        """The head of the task."""
        raise NotImplementedError

    def loss_of(self, logits_XA: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy; labels are (X,) numbers."""
        return F.cross_entropy(logits_XA, labels)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The logits of the labels, (X, A)."""
        texts = None if input_ids is None else Texts.of(input_ids, attention_mask, token_type_ids)
        batch = pack(texts, pixel_values, None, self.encoder.config)
        config = self.config
        if batch.num_sequences != config.num_images * batch.num_examples:
            raise ValueError(f"pixel_values must hold {config.num_images} images of each example: (X, n, 3, H, W)")
        logits_XA = choose(self.head, self.encoder(batch), batch, config.pool, config.num_images)
        loss = None if labels is None else self.loss_of(logits_XA, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_XA)


class VLMoEForVisualQuestionAnswering(VLMoEForChoice):
    """Answers a question about an image from a list."""

    def build_head(self, config: VLMoEConfig) -> nn.Module:
        """Pooler and two-layer head."""
        return answer_head(config.pool, config.hidden_size, config.num_labels)

    def loss_of(self, logits_XA: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, summed over the answers; labels are (X, A) soft scores."""
        total = F.binary_cross_entropy_with_logits(logits_XA, labels.to(logits_XA.dtype), reduction="sum")
        return total / logits_XA.shape[0]


class VLMoEForImageClassification(VLMoEForChoice):
    """The class of an image."""

    def build_head(self, config: VLMoEConfig) -> nn.Module:
        """A linear map."""
        return class_head(config.hidden_size, config.num_labels)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """The logits of the classes, (I, A)."""
        found = super().forward(pixel_values=pixel_values, labels=labels, return_dict=True)
        return ImageClassifierOutput(loss=found.loss, logits=found.logits)


class VLMoEForSequenceClassification(VLMoEForChoice):
    """The label of a pair of sentences, such as entailment."""

    def build_head(self, config: VLMoEConfig) -> nn.Module:
        """Pooler and a linear map."""
        return sentence_head(config.pool, config.hidden_size, config.num_labels)


class VLMoEForImagesAndTextClassification(VLMoEForChoice):
    """Whether a statement is true of several images; each is encoded together with it (NLVR2)."""

    def build_head(self, config: VLMoEConfig) -> nn.Module:
        """LayerNorm and two-layer head on the encodings side by side."""
        return pictures_head(config.pool, config.hidden_size, config.num_images, config.num_labels)


class _Comparing(VLMoEPreTrainedModel):
    """Compares images and texts that were encoded alone."""

    contrast: ContrastHead | None

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """(I, D) unit vectors of images alone."""
        return self._contrast.of_images(pool_cls(self.encode(None, pixel_values)))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(S, D) unit vectors of texts alone."""
        return self._contrast.of_texts(pool_cls(self.encode(Texts.of(input_ids, attention_mask, None), None)))

    @property
    def _contrast(self) -> ContrastHead:
        if self.contrast is None:
            raise ValueError("this model was trained without contrast: it can't compare images and texts encoded alone")
        return self.contrast


class VLMoEForRetrieval(_Comparing):
    """Finds images by texts and texts by images."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.contrast = ContrastHead(config.hidden_size)
        self.match = sentence_head(config.pool, config.hidden_size, 2)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> VLMoERetrievalOutput:
        """All images against all texts; their numbers may differ."""
        if pixel_values is None:
            raise ValueError("give pixel_values and input_ids, or call get_text_features")
        image_ID = self.get_image_features(pixel_values)
        text_SD = self.get_text_features(input_ids, attention_mask)
        logits_IS = self._contrast.scale * (image_ID @ text_SD.T)
        return VLMoERetrievalOutput(logits_IS, logits_IS.T, image_ID, text_SD)

    def get_match_logits(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """(S, 2) logits that image and text of the same number don't belong together, and that they do."""
        if not self.config.matches:
            raise ValueError("this model was trained without matching (itm_weight 0): use the cosines of forward")
        batch = pack(Texts.of(input_ids, attention_mask, None), pixel_values, None, self.encoder.config)
        logits_S2: Tensor = self.match(pool(self.encoder(batch), batch, self.config.pool)).float()
        return logits_S2


class VLMoEForPreTraining(_Comparing):
    """Predicts hidden words and the visual codes of hidden patches."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.heads = MaskedHeads(self.encoder.config, config.vocab_size, config.codebook_size)
        self.contrast = ContrastHead(config.hidden_size) if config.contrasts else None
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
        patch_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> VLMoEMaskedOutput:
        """The logits of every word and of every patch; labels of -100 don't count.

        Args:
            input_ids: words, the hidden ones [MASK].
            attention_mask: 0 where no token stands.
            token_type_ids: not used.
            pixel_values: uint8 (I, 3, H, W).
            bool_masked_pos: (I, P), True for patches that are hidden.
            labels: (S, L) words.
            patch_labels: (I, P) visual codes.
            **kwargs: return_dict.
        """
        texts = None if input_ids is None else Texts.of(input_ids, attention_mask, token_type_ids)
        encoded = self.encode(texts, pixel_values, bool_masked_pos)
        words = None if texts is None else texts.padded(self.heads.text(encoded.text_states_TD))
        patches = None if pixel_values is None else self.heads.image(encoded.image_states_IND[:, 1:])
        losses = [
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
            for logits, wanted in ((words, labels), (patches, patch_labels))
            if logits is not None and wanted is not None
        ]
        return VLMoEMaskedOutput(torch.stack(losses).sum() if losses else None, words, patches)
