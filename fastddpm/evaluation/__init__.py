"""What samples are worth, and what lower precision costs."""

from fastddpm.evaluation.fidelity import Evaluation, Evaluator, evaluate

__all__ = ["Evaluation", "Evaluator", "evaluate"]
