"""Small data files for RULER: essays, questions in the formats of SQuAD and HotpotQA."""

import json
import random
from pathlib import Path

WORDS = ["river", "stone", "window", "market", "winter", "garden", "letter", "engine", "copper", "shadow", "summer"]


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 14))).capitalize() + "."


def paragraph(draw: random.Random, sentences: int = 4) -> str:
    return " ".join(sentence(draw) for _ in range(sentences))


def write_data(folder: Path) -> Path:
    """A folder for --data-dir."""
    draw = random.Random(0)
    (folder / "essays").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / "essays" / f"{name}.txt").write_text("\n\n".join(paragraph(draw) for _ in range(60)))
    articles = []
    for article in range(4):
        paragraphs = []
        for number in range(5):
            answer = f"{draw.choice(WORDS)} {article}{number}"
            question = {
                "question": f"What is hidden in {article} {number}?",
                "answers": [{"text": answer}, {"text": "x"}],
            }
            unanswerable = {"question": "What is not there?", "answers": [], "is_impossible": True}
            context = f"{paragraph(draw)} Hidden is {answer}. {paragraph(draw)}"
            paragraphs.append({"context": context, "qas": [question, unanswerable]})
        articles.append({"title": f"Article {article}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    entries = []
    for number in range(12):
        context = [[f"Page {number} {i}", [sentence(draw), " " + sentence(draw)]] for i in range(3)]
        entries.append({"question": f"Which page is {number}?", "answer": f"page {number} 1", "context": context})
    (folder / "hotpotqa.json").write_text(json.dumps(entries))
    return folder
