"""From what a recipe says of a teacher to the teacher."""

from vlmoe_core.model.config import ModelConfig
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.teachers.pixels import PixelTeacher
from vlmoe_core.tokenizers.teachers.teacher import Teacher


def open_teacher(config: TeacherConfig, model: ModelConfig) -> Teacher:
    """The teacher of an encoder; its weights are not read yet."""
    if config.dim is None:
        return PixelTeacher(model.patch_size)
    from vlmoe_core.tokenizers.teachers.transformers_model import TransformersTeacher

    return TransformersTeacher(config, model)
