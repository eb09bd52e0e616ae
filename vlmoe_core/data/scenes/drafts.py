"""The examples of a numbered thing (a picture, a set of pictures, a pair of sentences), before pictures are drawn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vlmoe_core.data.example import Example
from vlmoe_core.data.scenes.classification import class_of, make_class_scene
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.entailment import make_entailment
from vlmoe_core.data.scenes.facts import statement_facts
from vlmoe_core.data.scenes.language import make_caption
from vlmoe_core.data.scenes.questions import make_question
from vlmoe_core.data.scenes.statements import make_pair_set
from vlmoe_core.data.scenes.world import MAX_OBJECTS, Combinations, Scene, Split, make_scene

Task = Literal["vqa", "nlvr2", "classification", "nli"]

ANSWERS = 10
"""Human answers to a question of VQA v2; here all are the same."""
PAIRS_A_SET = 2
"""Pairs of pictures in a set of nlvr2, and sentences about each."""


@dataclass(frozen=True)
class World:
    """Which of the worlds."""

    split: Split
    seed: int
    combinations: Combinations
    max_objects: int = MAX_OBJECTS

    def name(self, number: int) -> str:
        """The name of its thing of that number, and of the random numbers that make it."""
        return f"scenes/{self.split}/{self.seed}/{number}"

    def scene(self, number: int) -> Scene:
        """Its scene of that number."""
        return make_scene(self.split, self.seed, number, self.combinations, self.max_objects)


@dataclass(frozen=True)
class Draft:
    """An example without its pictures, and the scenes to draw."""

    example: Example
    scenes: tuple[Scene, ...] = ()


Drafter = Callable[[World, int, int], Iterator[Draft]]
"""(world, number of the thing, examples wanted of it) -> those examples."""


def images(world: World, number: int, each: int) -> Iterator[Draft]:
    """The picture alone."""
    scene = world.scene(number)
    yield Draft(Example(world.name(number), image_id=number, facts={"scene": scene.as_facts()}), (scene,))


def captions(world: World, number: int, each: int) -> Iterator[Draft]:
    """Captions of one picture."""
    scene = world.scene(number)
    for which in range(each):
        caption = make_caption(scene, Dice(f"{world.name(number)}/caption/{which}"))
        facts = {"scene": scene.as_facts(), "meaning": statement_facts(caption.meaning)}
        yield Draft(Example(f"{world.name(number)}#{which}", None, caption.text, number, facts), (scene,))


def questions(world: World, number: int, each: int) -> Iterator[Draft]:
    """Questions about one picture."""
    scene = world.scene(number)
    for which in range(each):
        name = f"{world.name(number)}/question/{which}"
        question = make_question(scene, Dice(name))
        facts = {
            "id": number * each + which,
            "answers": (question.answer,) * ANSWERS,
            "answer": question.answer,
            "answer_type": question.answer_type,
            "question_type": question.question_type,
            "scene": scene.as_facts(),
        }
        yield Draft(Example(name, None, question.text, number, facts), (scene,))


def statements(world: World, number: int, each: int) -> Iterator[Draft]:
    """Two pairs of pictures, each with two sentences: four examples in all. `id` is made as NLVR2's identifiers."""
    found = make_pair_set(world.split, world.seed, number, world.combinations, world.max_objects)
    for which in range(each):
        pair, sentence = divmod(which, PAIRS_A_SET)
        name = f"{world.split}-{number}-{pair}-{sentence}"
        said = found.sentences[sentence]
        facts: dict[str, Any] = {"id": name, "label": str(found.label(pair, sentence))}
        facts["statement_type"] = said.statement_type
        facts["scenes"] = tuple(scene.as_facts() for scene in found.pairs[pair])
        image_id = number * PAIRS_A_SET + pair
        yield Draft(Example(f"scenes/{world.seed}/{name}", None, said.text, image_id, facts), found.pairs[pair])


def classes(world: World, number: int, each: int) -> Iterator[Draft]:
    """A picture with a class."""
    scene = make_class_scene(world.split, world.seed, number, world.combinations)
    name = f"{world.name(number)}/class"
    facts = {"id": name, "label": class_of(scene), "scene": scene.as_facts()}
    yield Draft(Example(name, image_id=number, facts=facts), (scene,))


def entailments(world: World, number: int, each: int) -> Iterator[Draft]:
    """A premise and a hypothesis. None names a held-out pair of colour and shape, in no split."""
    name = f"{world.name(number)}/entailment"
    found = make_entailment(Dice(name))
    facts = {"id": name, "label": found.label}
    yield Draft(Example(name, text=found.premise.text, second_text=found.hypothesis.text, facts=facts))
