"""Train the tone model: complaint, thanks or neither, from texts that the grammar below makes up.

    python scripts/train_tone.py            # a few seconds; writes telemetry/tone.json

No text of any user goes in: {name} in a sentence stands for any of the phrases of that name. A third of the sentences'
shapes are held out to see how far it carries. "Neither" has the words of praise and blame too, as the matter of a
request. The penalty is L1, so most pairs of words weigh nothing and are left out; words stay, for they also tell
English from what is not. Needs scikit-learn; the gateway and the controller do not.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from telemetry.tone import KINDS, SURE, features, read  # noqa: E402

WEIGHTS = ROOT / "telemetry" / "tone.json"
CLASSES = (*KINDS, "neither")
EACH = 4000
"""Texts of a class."""

PHRASES = {
    "it": "it|this|that|the code|your code|the answer|your answer|the function|the result|the output"
    "|the query|the script|the summary|the text|the translation|your solution|the second part|the first one",
    "thing": "a function|a list|a table|a summary|the file|the data|an email|a poem|the column|a story|a letter"
    "|the report|a plan|a recipe|a test|the numbers|an essay|a query|the price|a product|the meeting|the code",
    "work": "work|run|compile|help|match|make sense|answer my question|do what i asked|add up|return anything"
    "|fit|load|print anything|pass|give the right result",
    "bad": "wrong|incorrect|broken|useless|bad|terrible|too long|too short|nonsense|not right|not correct|not true"
    "|not helpful|off|outdated|made up|garbage|not what i asked for|not what i wanted|confusing|unusable|awful",
    "good": "great|perfect|awesome|excellent|amazing|wonderful|brilliant|fantastic|lovely|cool|nice|very helpful"
    "|really good|exactly right|exactly what i needed|just what i wanted|super helpful|very clear|spot on",
    "no": "no|nope|hmm|wait|sorry but|no no|but|um|ugh|come on|still",
    "error": "an error|the same error|the same result|a syntax error|nothing|an exception|the wrong result"
    "|an empty list|a blank page|the same answer|false|a type error|the same problem",
    "wish": "can you add {thing}|now do the same for {thing}|please add {thing}|make it shorter"
    "|now write {thing}|how do i use it with {thing}|can you also explain {thing}|next question"
    "|one more question|translate it into french",
    "topic": "python|pandas|history|the weather|cats|our company|the customer|a friend|the internet|math|music"
    "|physics|germany|a list of names|two numbers|the moon|javascript|sales|the team|my garden|a string|an array",
    "person": "my boss|a customer|my friend|the teacher|a colleague|the client|my neighbour|our landlord|the team",
    "must": "need|want|would like|have|am looking for|am working on|would love",
}
GRAMMAR = {
    "complaint": """
{it} does not {work}
{it} still does not {work}
{no} {it} does not {work}
{it} did not {work}
{it} is {bad}
{no} {it} is {bad}
{no} {bad}
{it} is still {bad}
that is {bad}
{bad}
you forgot {thing}
you missed {thing}
you did not include {thing}
you ignored {thing}
you did not read {thing}
you misunderstood me
you misunderstood my question
you keep making the same mistake
you made a mistake in {thing}
{no} i asked for {thing} not {thing}
{no} i said {thing}
{no} i meant {thing}
i did not ask for {thing}
i asked you for {thing}
that is not what i asked
that is not it
that did not help
this makes no sense
i get {error}
i still get {error}
{no} now i get {error}
it gives {error}
it gives me {error}
it returns {error}
it says {error}
still {error}
still {bad}
still not working
not working
does not {work}
the test fails
it fails
this fails
it crashes
it is timing out
{it} fails on {thing}
{it} crashes when i run it
there is a mistake in {thing}
there is an error in {it}
why did you change {thing} i did not ask for that
stop making things up
try again
{it} is {bad} please fix it
{it} is {bad} try again
{it} does not take {thing} into account
{it} does not handle {thing}
i do not like it
i am not happy with {it}
{it} has nothing to do with {topic}
this is the same answer as before
you just repeated yourself
what the hell
are you kidding me
""",
    "thanks": """
thanks
thank you
thank you so much
thank you very much
many thanks
thanks a lot
thanks {wish}
thank you {wish}
ok thanks
ok thank you
{good}
{good} thanks
{good} thank you
thanks that is {good}
that is {good}
{it} is {good}
this is {good}
{good} {wish}
{it} works
{it} works now
{it} worked
that worked thanks
it works {good}
yes that is {good}
wow {good}
wow that is {good}
that helped
that helped a lot
that helps
that makes sense
i appreciate it
much appreciated
you are {good}
you are the best
good job
well done
great job
nice work
i love it
love it
that is exactly what i was looking for
got it thanks
i see thanks
i understand now thank you
cheers
problem solved thanks
solved thank you
that solved it
""",
    "neither": """
{wish}
{wish} about {topic}
write {thing} about {topic}
write {thing} for {person} that says {good}
write a {good} letter to {person}
write a thank you note to {person}
a {good} way to write {thing}
{person} said {it} is {bad}
{person} says {it} is {good}
{person} thinks the price is {bad}
{person} wrote that {thing} does not {work}
{person} complains that {thing} is {bad}
tell {person} that {thing} is {good}
tell {person} thanks for {thing}
reply to {person} who is not happy with {thing}
find what is {bad} in {thing}
fix the error in {thing}
find the error in {thing}
what is wrong with {thing}
why does {thing} not {work}
why do i get {error}
why is {thing} {bad}
is {thing} {bad} or {good}
is {it} {good}
is it correct
i {must} {thing}
i {must} {thing} about {topic}
i {must} {thing} that does not {work}
i {must} help with {topic}
i have {thing} and i want {thing}
i have two lists i want one to be sorted
my {thing} does not {work} can you help
my code returns {error}
my dog is {bad}
the movie was {good}
the food was {bad} and the room was {good}
classify this review the product is {bad}
classify this review the product is {good}
translate thank you into german
translate {it} is {bad} into french
summarize {thing}
summarize what {person} said about {topic}
explain {topic}
explain {topic} to {person}
explain why {it} does not {work}
yes
no
ok
yes please
no need
sure go on
continue
go on
next
please continue
the first one
both
in {topic}
with {thing}
use {thing} instead
use {topic} instead
instead of {thing} use {thing}
change {thing} to {thing}
make {thing} {good}
remove {thing}
add {thing} to {thing}
sort {thing} by {thing}
round {thing}
how to convert {thing} to {thing} in {topic}
how do i get {thing} from {thing}
how do i check if {thing} is {bad}
what is {thing}
what about {thing}
what about {topic}
and if {thing} is {bad}
what if {it} does not {work}
what if {it} fails
when {it} is {bad} return {error}
when {it} works print {thing}
if {it} does not {work} return {error}
return {error} if {it} is {bad}
it should return {error} when {thing} is {bad}
the function should return {error}
it has to be {good} for {person}
it is a {good} day
it is {thing} for {person}
this is {thing} about {topic}
this is my code
here is {thing}
here is what i have
here is {thing} can you check it
i tried {thing} and {thing}
i work with {topic}
i live in {topic}
i think {thing} is {good} for {topic}
let us talk about {topic}
do the same for {topic}
check {thing}
check if {thing} is in {thing}
compare {thing} and {thing}
give me {thing}
give me {thing} about {topic}
list all {topic}
make it {good}
make it less {bad}
say that {it} is {bad} but politely
say thanks to {person} for {thing}
shorter
in english please
more examples
tell me more about {topic}
""",
}
_NAME = re.compile(r"\{(\w+)\}")


def spelled(shape: str, chance: random.Random) -> str:
    """`shape` with a phrase in each of its places."""
    while _NAME.search(shape):
        shape = _NAME.sub(lambda found: chance.choice(PHRASES[found[1]].split("|")), shape, count=1)
    return shape


def texts(held_out: bool | None, chance: random.Random) -> list[tuple[str, str]]:
    """Class and text, `EACH` of a class; every third shape is the held-out part, None is all."""
    made = []
    for kind in CLASSES:
        shapes = [line for line in GRAMMAR[kind].split("\n") if line]
        shapes = [one for n, one in enumerate(shapes) if held_out is None or (n % 3 == 2) == held_out]
        made += [(kind, spelled(shapes[n % len(shapes)], chance)) for n in range(EACH)]
    return made


def fit(rows: list[tuple[str, str]]) -> dict[str, list[float]]:
    """Weights by feature, of complaint and thanks relative to neither."""
    columns = CountVectorizer(analyzer=lambda text: sorted(features(read(text))), binary=True)
    seen = columns.fit_transform([text for _, text in rows])
    model = LogisticRegression(solver="saga", l1_ratio=1.0, C=1.0, max_iter=300, tol=1e-3, random_state=1)
    model.fit(seen, [CLASSES.index(kind) for kind, _ in rows])
    relative = (model.coef_[:2] - model.coef_[2]).round(2)
    weights = {"": (model.intercept_[:2] - model.intercept_[2]).round(2).tolist()}
    for name, column in sorted(columns.vocabulary_.items()):
        if relative[:, column].any() or " " not in name:
            weights[name] = (relative[:, column] + 0.0).tolist()
    return weights


def verdicts(weights: dict[str, list[float]], rows: list[tuple[str, str]]) -> dict[str, tuple[int, int, int]]:
    """By kind: said, rightly said, to be said; by the model alone, without the patterns."""
    counts = {kind: [0, 0, 0] for kind in KINDS}
    for truth, text in rows:
        found = filter(None, map(weights.get, features(read(text))))
        scores = [sum(one) for one in zip(weights[""], *found, strict=True)]
        total = 1.0 + sum(map(math.exp, scores))
        for kind, score in zip(KINDS, scores, strict=True):
            said = math.exp(score) / total >= SURE
            counts[kind][0] += said
            counts[kind][1] += said and kind == truth
            counts[kind][2] += kind == truth
    return {kind: (a, b, c) for kind, (a, b, c) in counts.items()}


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.parse_args()
    tried = verdicts(fit(texts(False, random.Random(1))), texts(True, random.Random(2)))
    for kind, (said, right, there) in tried.items():
        print(f"{kind}, shapes never seen: precision {right / max(1, said):.3f}, recall {right / there:.3f}")
    made = json.dumps(fit(texts(None, random.Random(3))), separators=(",", ":"), ensure_ascii=False) + "\n"
    WEIGHTS.write_text(made, "utf-8")
    print(f"{WEIGHTS}: {len(made) / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
