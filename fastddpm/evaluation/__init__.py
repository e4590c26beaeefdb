"""Measure how good samples are, and what a lower precision costs."""

from fastddpm.evaluation.fidelity import Evaluation, Evaluator, evaluate

__all__ = ["Evaluation", "Evaluator", "evaluate"]
