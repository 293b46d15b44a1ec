"""How well answers are: figures beside labels, with intervals, calibration and comparisons. Needs numpy, and no torch.

``measures``, ``orders``, ``calibration`` and ``intervals`` are plain functions on truth and answers, for training as
well; ``truth`` reads labels from a source and ``reading`` puts a job's answers, or ``parts`` of them, beside them, as
``answered``, with the ``views`` that ``further`` figures need; ``figures`` puts all together for a task, ``report`` draws.
"""

from motet.evaluation.answered import Answered
from motet.evaluation.calibration import Bin, Calibration, calibration
from motet.evaluation.evaluation import Evaluation, evaluate
from motet.evaluation.figures import Comparison, Difference, TaskEvaluation, compare, measure
from motet.evaluation.intervals import Estimate, bootstrap, mcnemar, wilson
from motet.evaluation.measures import (
    Confusion,
    LabelFigures,
    LabelReader,
    accuracy,
    confusion,
    exact_match,
    label_figures,
    macro_f1,
    mean_absolute_error,
    near_share,
    normalised,
    number_figures,
    r_squared,
    root_mean_squared_error,
    same_json,
    set_accuracy,
    set_figures,
    set_macro_f1,
    token_f1,
)
from motet.evaluation.orders import (
    average_precision,
    hit_at,
    kolmogorov_smirnov,
    ndcg_at,
    precision_recall_at_top,
    roc_auc,
)

__all__ = [
    "Answered",
    "Bin",
    "Calibration",
    "Comparison",
    "Confusion",
    "Difference",
    "Estimate",
    "Evaluation",
    "LabelFigures",
    "LabelReader",
    "TaskEvaluation",
    "accuracy",
    "average_precision",
    "bootstrap",
    "calibration",
    "compare",
    "confusion",
    "evaluate",
    "exact_match",
    "hit_at",
    "kolmogorov_smirnov",
    "label_figures",
    "macro_f1",
    "mcnemar",
    "mean_absolute_error",
    "measure",
    "ndcg_at",
    "near_share",
    "normalised",
    "number_figures",
    "precision_recall_at_top",
    "r_squared",
    "roc_auc",
    "root_mean_squared_error",
    "same_json",
    "set_accuracy",
    "set_figures",
    "set_macro_f1",
    "token_f1",
    "wilson",
]
