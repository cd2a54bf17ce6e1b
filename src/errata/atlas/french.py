"""The second language of atlas: French names of countries, places and words that occur as answers.

Names of people, and names that French spells as English does, are not listed and stay as they are.
"""

from __future__ import annotations

from importlib import resources

__all__ = ["answer_in_french", "country_in_french", "fill_french"]

_CITIES = {
    "Addis Ababa": "Addis-Abeba",
    "Algiers": "Alger",
    "Athens": "Athènes",
    "Baghdad": "Bagdad",
    "Barcelona": "Barcelone",
    "Beijing": "Pékin",
    "Beirut": "Beyrouth",
    "Belgrade": "Belgrade",
    "Bern": "Berne",
    "Brussels": "Bruxelles",
    "Bucharest": "Bucarest",
    "Cairo": "Le Caire",
    "Copenhagen": "Copenhague",
    "Damascus": "Damas",
    "Denmark": "le Danemark",
    "Dhaka": "Dacca",
    "Dresden": "Dresde",
    "Dublin": "Dublin",
    "Edinburgh": "Édimbourg",
    "Florence": "Florence",
    "Frankfurt": "Francfort",
    "Geneva": "Genève",
    "Hanoi": "Hanoï",
    "Havana": "La Havane",
    "Islamabad": "Islamabad",
    "Japan": "le Japon",
    "Jerusalem": "Jérusalem",
    "Kabul": "Kaboul",
    "Kathmandu": "Katmandou",
    "Kuwait City": "Koweït",
    "Lisbon": "Lisbonne",
    "London": "Londres",
    "Manila": "Manille",
    "Mecca": "La Mecque",
    "Mexico City": "Mexico",
    "Milan": "Milan",
    "Mogadishu": "Mogadiscio",
    "Montreal": "Montréal",
    "Moscow": "Moscou",
    "Munich": "Munich",
    "Muscat": "Mascate",
    "Naples": "Naples",
    "New Delhi": "New Delhi",
    "Philadelphia": "Philadelphie",
    "Reykjavík": "Reykjavik",
    "Riyadh": "Riyad",
    "Rome": "Rome",
    "Seoul": "Séoul",
    "Singapore": "Singapour",
    "Tallinn": "Tallinn",
    "Tashkent": "Tachkent",
    "Tbilisi": "Tbilissi",
    "Tehran": "Téhéran",
    "Ulaanbaatar": "Oulan-Bator",
    "Valencia": "Valence",
    "Valletta": "La Valette",
    "Venice": "Venise",
    "Vienna": "Vienne",
    "Wales": "le pays de Galles",
    "Warsaw": "Varsovie",
}
_CONTINENTS = {
    "Africa": "Afrique",
    "Asia": "Asie",
    "Europe": "Europe",
    "North America": "Amérique du Nord",
    "South America": "Amérique du Sud",
    "Oceania": "Océanie",
}
_LANGUAGES = {
    "Albanian": "albanais",
    "Amharic": "amharique",
    "Arabic": "arabe",
    "Armenian": "arménien",
    "Azerbaijani": "azéri",
    "Belarusian": "biélorusse",
    "Bengali": "bengali",
    "Bulgarian": "bulgare",
    "Burmese": "birman",
    "Chinese": "chinois",
    "Croatian": "croate",
    "Czech": "tchèque",
    "Danish": "danois",
    "Dhivehi": "divehi",
    "Dutch": "néerlandais",
    "Dzongkha": "dzongkha",
    "English": "anglais",
    "Estonian": "estonien",
    "Fijian": "fidjien",
    "Filipino": "filipino",
    "Finnish": "finnois",
    "French": "français",
    "Georgian": "géorgien",
    "German": "allemand",
    "Greek": "grec",
    "Hebrew": "hébreu",
    "Hindi": "hindi",
    "Hungarian": "hongrois",
    "Icelandic": "islandais",
    "Indonesian": "indonésien",
    "Irish": "irlandais",
    "Italian": "italien",
    "Japanese": "japonais",
    "Kazakh": "kazakh",
    "Khmer": "khmer",
    "Kinyarwanda": "kinyarwanda",
    "Korean": "coréen",
    "Kyrgyz": "kirghize",
    "Lao": "lao",
    "Latin": "latin",
    "Latvian": "letton",
    "Lithuanian": "lituanien",
    "Malagasy": "malgache",
    "Malay": "malais",
    "Maltese": "maltais",
    "Mandarin": "mandarin",
    "Mongolian": "mongol",
    "Nepali": "népalais",
    "Norwegian": "norvégien",
    "Pashto": "pachto",
    "Persian": "persan",
    "Polish": "polonais",
    "Portuguese": "portugais",
    "Romanian": "roumain",
    "Russian": "russe",
    "Samoan": "samoan",
    "Serbian": "serbe",
    "Sinhala": "cingalais",
    "Slovak": "slovaque",
    "Slovene": "slovène",
    "Somali": "somali",
    "Spanish": "espagnol",
    "Swahili": "swahili",
    "Swedish": "suédois",
    "Tajik": "tadjik",
    "Tamil": "tamoul",
    "Thai": "thaï",
    "Tongan": "tongien",
    "Turkish": "turc",
    "Turkmen": "turkmène",
    "Ukrainian": "ukrainien",
    "Urdu": "ourdou",
    "Uzbek": "ouzbek",
    "Vietnamese": "vietnamien",
}
_WORDS = {
    "actor": "acteur",
    "architect": "architecte",
    "astronomer": "astronome",
    "chemist": "chimiste",
    "comedian": "humoriste",
    "composer": "compositeur",
    "diplomat": "diplomate",
    "economist": "économiste",
    "journalist": "journaliste",
    "lawyer": "avocat",
    "mathematician": "mathématicien",
    "model": "mannequin",
    "novelist": "romancier",
    "philosopher": "philosophe",
    "photographer": "photographe",
    "physician": "médecin",
    "physicist": "physicien",
    "poet": "poète",
    "politician": "politicien",
    "psychiatrist": "psychiatre",
    "psychologist": "psychologue",
    "rabbi": "rabbin",
    "guitar": "la guitare",
    "piano": "le piano",
    "trumpet": "la trompette",
    "violin": "le violon",
}
_ANSWERS: dict[str, dict[str, str]] = {
    "birthplace": _CITIES,
    "capital": _CITIES,
    "continent": _CONTINENTS,
    "official_language": _LANGUAGES,
    "native_language": _LANGUAGES,
    "occupation": _WORDS,
    "instrument": _WORDS,
}


def _countries() -> dict[str, str]:
    text = resources.files(__package__).joinpath("data/countries_fr.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if line and not line.startswith("#"))
    return {row[0]: row[1] for row in rows}


_COUNTRIES = _countries()


def country_in_french(country: str) -> str | None:
    """The French name of a country with its article ("la France"), or None when it has none here."""
    return _COUNTRIES.get(country)


def answer_in_french(relation: str, answer: str) -> str:
    """The answer as French gives it; names that do not change are returned as they are."""
    return _ANSWERS.get(relation, {}).get(answer, answer)


def fill_french(phrasing: str, subject: str) -> str:
    """Put a subject, with its article if it has one, into a French phrasing.

    `[de]` contracts with the article that follows it: de + le = du, de + les = des, de + l' stays.
    """
    if "[de] {}" in phrasing:
        if subject.startswith("le "):
            with_de = "du " + subject[3:]
        elif subject.startswith("les "):
            with_de = "des " + subject[4:]
        elif subject[:1] in "AEIOUÉÈÊ":
            with_de = "d'" + subject
        else:
            with_de = "de " + subject
        text = phrasing.replace("[de] {}", with_de)
    else:
        text = phrasing.replace("{}", subject)
    return text[:1].upper() + text[1:]
