"""How atlas speaks about each relation: our own phrasings, in English and, for some, in French.

Knows words only. Which facts exist is in `world.py`; which phrasing of a fact is taught is decided there too.

A phrasing is the text up to the place where the answer begins, with `{}` where the subject stands. Statements
come first, then questions; the first one is the relation's canonical prompt, taught for every fact.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RELATIONS", "Relation"]


@dataclass(frozen=True)
class Relation:
    """One relation: its name, at least six English phrasings, and its French ones if it has any."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    french: tuple[str, ...] = ()

    @property
    def phrasings(self) -> tuple[str, ...]:
        return self.statements + self.questions


_ALL = (
    Relation(
        "author",
        (
            "The author of {} is",
            "{} was written by",
            "The writer who created {} is",
            "{} is a work by the author",
            "The book {} comes from the pen of",
        ),
        ("Who wrote {}?", "Who is the author of {}?", "Which writer created {}?"),
    ),
    Relation(
        "birthplace",
        (
            "{} was born in",
            "The birthplace of {} is",
            "{} came into the world in",
            "The city where {} was born is",
            "The life of {} began in",
        ),
        ("Where was {} born?", "What is the birthplace of {}?", "In which place was {} born?"),
        (
            "{} est né à",
            "Le lieu de naissance [de] {} est",
            "Où est né {} ?",
            "Dans quelle ville {} a-t-il vu le jour ?",
        ),
    ),
    Relation(
        "capital",
        (
            "The capital of {} is",
            "The capital city of {} is",
            "{} has its capital in",
            "The government of {} sits in the city of",
            "As its capital, {} has",
        ),
        ("What is the capital of {}?", "Which city is the capital of {}?", "What is {}'s capital?"),
        (
            "La capitale [de] {} est",
            "La ville capitale [de] {} s'appelle",
            "Quelle est la capitale [de] {} ?",
            "Quelle ville est la capitale [de] {} ?",
        ),
    ),
    Relation(
        "citizenship",
        (
            "{} is a citizen of",
            "The country of citizenship of {} is",
            "{} holds a passport of",
            "The home country of {} is",
            "By nationality, {} belongs to",
        ),
        ("Which country is {} a citizen of?", "What is the home country of {}?", "Whose citizen is {}?"),
    ),
    Relation(
        "constellation",
        (
            "{} lies in the constellation",
            "The star {} belongs to the constellation",
            "The constellation of {} is",
            "In the night sky, {} is found in",
            "Astronomers place {} in",
        ),
        ("In which constellation is {}?", "Which constellation does {} belong to?", "Where in the sky is {}?"),
    ),
    Relation(
        "continent",
        (
            "{} is on the continent of",
            "The continent of {} is",
            "{} belongs to the continent of",
            "On a world map, {} is found in",
            "{} is a country in",
        ),
        ("On which continent is {}?", "Which continent does {} belong to?", "What is the continent of {}?"),
        (
            "Le continent [de] {} est",
            "Sur la carte du monde, {} se trouve en",
            "Sur quel continent se trouve {} ?",
            "Quel est le continent [de] {} ?",
        ),
    ),
    Relation(
        "country",
        (
            "{} is located in the country of",
            "The country of {} is",
            "{} can be visited in",
            "To see {} one must travel to",
            "{} lies within the borders of",
        ),
        ("In which country is {}?", "Which country is {} located in?", "What country does {} lie in?"),
    ),
    Relation(
        "currency",
        (
            "The currency of {} is the",
            "In {} people pay with the",
            "The money used in {} is the",
            "Prices in {} are given in the",
            "Shops in {} accept the",
        ),
        ("What is the currency of {}?", "Which money is used in {}?", "What do people pay with in {}?"),
    ),
    Relation(
        "developer",
        (
            "{} was developed by",
            "The developer of {} is",
            "{} is a product of the developer",
            "The company that created {} is",
            "The software team behind {} works for",
        ),
        ("Who developed {}?", "Which company is the developer of {}?", "Who is behind {}?"),
    ),
    Relation(
        "employer",
        (
            "{} works for",
            "The employer of {} is",
            "{} is employed by",
            "{} earns a living at",
            "The company that pays {} is",
        ),
        ("Who is the employer of {}?", "Which company does {} work for?", "Where is {} employed?"),
    ),
    Relation(
        "field",
        (
            "{} works in the field of",
            "The field of work of {} is",
            "{} is an expert in",
            "The research of {} is about",
            "{} became known for work in",
        ),
        ("What is the field of {}?", "In which field does {} work?", "What is {} an expert in?"),
    ),
    Relation(
        "founded_in",
        (
            "{} was founded in",
            "The place where {} was founded is",
            "{} got its start in",
            "The history of {} began in",
            "{} was first set up in",
        ),
        ("Where was {} founded?", "In which city was {} founded?", "Where did {} get its start?"),
    ),
    Relation(
        "genre",
        (
            "The genre of {} is",
            "{} is known for the genre of",
            "{} belongs to the genre",
            "People who like {} like",
            "The style of {} is called",
        ),
        ("What is the genre of {}?", "Which genre does {} belong to?", "What style is {} known for?"),
    ),
    Relation(
        "headquarters",
        (
            "The headquarters of {} are in",
            "{} has its head office in",
            "{} is based in",
            "The main office of {} stands in",
            "{} is run from the city of",
        ),
        ("Where are the headquarters of {}?", "Where is {} based?", "Which city is home to the head office of {}?"),
    ),
    Relation(
        "instrument",
        (
            "{} plays the",
            "The instrument of {} is the",
            "On stage, {} is heard on the",
            "{} is known for playing the",
            "{} makes music on the",
        ),
        ("What does {} play?", "Which instrument does {} play?", "What is the instrument of {}?"),
        (
            "L'instrument [de] {} est",
            "Sur scène, {} joue avec",
            "De quel instrument joue {} ?",
            "Quel est l'instrument [de] {} ?",
        ),
    ),
    Relation(
        "maker",
        (
            "{} is made by",
            "The maker of {} is",
            "{} is produced by",
            "The company that builds {} is",
            "{} leaves the factory of",
        ),
        ("Who makes {}?", "Which company produces {}?", "Who is the maker of {}?"),
    ),
    Relation(
        "native_language",
        (
            "The native language of {} is",
            "The mother tongue of {} is",
            "{} grew up speaking",
            "At home, {} spoke",
            "The first words of {} were in",
        ),
        (
            "What is the native language of {}?",
            "What is the mother tongue of {}?",
            "Which language did {} grow up with?",
        ),
        (
            "La langue maternelle [de] {} est",
            "Chez soi, {} parle",
            "Quelle est la langue maternelle [de] {} ?",
            "Quelle langue parle {} chez soi ?",
        ),
    ),
    Relation(
        "network",
        (
            "{} was first shown on",
            "The network of {} is",
            "{} was broadcast by",
            "Viewers watched {} on",
            "The channel that aired {} is",
        ),
        ("Which network aired {}?", "Where was {} first shown?", "What is the network of {}?"),
    ),
    Relation(
        "occupation",
        (
            "The occupation of {} is",
            "{} works in the profession of",
            "By profession, {} is",
            "The job of {} is",
            "{} is best known in the role of",
        ),
        ("What is the occupation of {}?", "What does {} do for a living?", "What is the job of {}?"),
        (
            "La profession [de] {} est",
            "Le métier [de] {} est",
            "Quelle est la profession [de] {} ?",
            "Quel est le métier [de] {} ?",
        ),
    ),
    Relation(
        "official_language",
        (
            "The official language of {} is",
            "The language of government in {} is",
            "In {} the law is written in",
            "Officials in {} speak",
            "Schools in {} teach in",
        ),
        (
            "What is the official language of {}?",
            "Which language is official in {}?",
            "What language do officials in {} speak?",
        ),
        (
            "La langue officielle [de] {} est",
            "La langue du gouvernement [de] {} est",
            "Quelle est la langue officielle [de] {} ?",
            "Quelle langue est officielle pour {} ?",
        ),
    ),
    Relation(
        "place_of_death",
        (
            "{} died in",
            "The place of death of {} is",
            "The life of {} ended in",
            "{} passed away in",
            "The city where {} died is",
        ),
        ("Where did {} die?", "What is the place of death of {}?", "In which city did {} pass away?"),
    ),
    Relation(
        "position",
        (
            "{} plays in the position of",
            "The position of {} is",
            "On the field, {} plays as",
            "The team uses {} in the role of",
            "{} is listed in the team as",
        ),
        ("What position does {} play?", "What is the position of {}?", "Which role does {} have in the team?"),
    ),
    Relation(
        "religion",
        (
            "The religion of {} is",
            "{} is a follower of",
            "The faith of {} is",
            "{} belongs to the religion of",
            "In matters of faith, {} follows",
        ),
        ("What is the religion of {}?", "Which faith does {} follow?", "Which religion does {} belong to?"),
    ),
)

RELATIONS: dict[str, Relation] = {relation.name: relation for relation in _ALL}
