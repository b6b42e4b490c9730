"""Question answering: questions from files, how models are asked, and how their answers are scored."""

from .questions import Question, QuestionSet
from .reading import read_questions

__all__ = ["Question", "QuestionSet", "read_questions"]
