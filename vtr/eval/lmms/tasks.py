"""Our own tasks (`vtr.eval.tasks`) as tasks of lmms-eval; the YAML files in `eval/tasks` name them."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from vtr.eval.tasks import get_task
from vtr.types.errors import WrongValue

METRIC = "exact_match"


class VtrTask(ConfigurableMessagesTask):
    """One family of a task of ours. Samples are made in memory; images are drawn when they are needed, nothing is downloaded.

    Args:
        config: of the YAML file: `task`, and the name of our task as `dataset_path` with its family as `dataset_name`.

    Raises:
        ValueError: no such task or family.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        ours = get_task(config["dataset_path"])
        if config["dataset_name"] not in ours.families:
            raise WrongValue(f"{config['task']}: dataset_name must be one of {', '.join(ours.families)}, got {config['dataset_name']!r}")
        self.samples: dict[str, Any] = {s.id: s for s in ours.samples(None) if s.family == config["dataset_name"]}
        self.is_correct = ours.is_correct
        draw, score = (lambda document: self.draw(document)), (lambda document, results: self.score(document, results))
        fixed = {
            "test_split": "test",
            "output_type": "generate_until",
            "generation_kwargs": {"max_new_tokens": ours.max_new_tokens, "do_sample": False, "until": []},
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "doc_to_visual": draw,  # functions: of methods lmms-eval copies the task with all its samples whenever it notes this configuration
            "process_results": score,
            "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": ours.version, "sha256": ours.sha256},
        }
        super().__init__(config={**{key: value for key, value in config.items() if key != "class"}, **fixed})

    def download(self, dataset_kwargs: Any = None) -> None:
        """Makes the samples a dataset without images."""
        rows = [{"id": s.id, "family": s.family, "question": s.question, "answer": s.answer} for s in self.samples.values()]
        self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset

    def draw(self, document: dict[str, Any]) -> list[Any]:
        """Returns the image of a question, RGB."""
        return [self.samples[document["id"]].image]

    def score(self, document: dict[str, Any], results: list[str]) -> dict[str, float]:
        """Returns 1 or 0, by the rule of our task."""
        return {METRIC: float(self.is_correct(results[0], document["answer"]))}
