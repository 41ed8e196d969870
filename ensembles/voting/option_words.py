"""The words around the letter of an option: by which it is told from an article or a pronoun, and what is said of it.

English, and the smallest words of some other languages. `ensembles.voting.options` says how they are used.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Nouns that name an option: no article or pronoun follows them.
NOUNS = _words("option options choice answer alternative letter candidate opción opcion réponse antwort respuesta")

# Verbs, prepositions and small words before an option that is chosen, compared or named.
VERBS = _words(
    """
    see view regard
    choose chose chosen choosing pick picked picking picks select selected selecting selects chooses with for on
    toward towards to say saying says mark marked circle circled tick favor favour prefer prefers favors
    conclude than over of like by about from unlike except against excluding eliminate eliminated reject exclude
    gives give giving leaves leaving matches match matching makes make suggests suggest indicates indicate
    supports support confirms confirm recommend recommends equals guess answered entry bubble vote votes so
    therefore thus hence not just only definitely clearly probably likely surely simply certainly obviously
    either or and both neither nor then rule us me think believe find found deem consider considering that
    called labelled labeled la el le die der das den il lo
    """
)

# What stands before an option that something is said to be; a sentence may begin after some of them.
COPULAS = _words(
    "is be was are been being it's that's here's es est ist è é jest is: são seems 是 选 = : → => -> ⇒ ≈ — –"
)

# Words that no surname is, where they begin a sentence behind a letter: "Surely A. The ..."
NOT_SURNAMES = _words(
    "the this that it its he she they we you so because since as not no but and or if in on by for all both there"
)

# Nouns whose letter is a part of their name: vitamin C.
ENTITIES = _words(
    """
    train pipe machine city vitamin vitamins plan hepatitis type types grade grades class section figure fig
    appendix point points line let
    lines angle segment side matrix vector set sets event events node team room level part mr mrs dr prof note
    key
    """
)

# Words between which and a point "I" is a pronoun: so do I.
SUBJECTS_BEFORE_I = _words(
    """
    and do did am can could will would should have had was as that than if when where while because which what
    may might must shall are were so but since or
    """
)

# Words after an option's name that do not follow an article.
AFTER = _words(
    """
    is was are were be seems seemed looks has had cannot can't won't does did isn't wasn't doesn't didn't aren't
    wouldn't shouldn't appears remains stands makes fits works because since as for and or but not over rather
    instead than per it if when where which who that with without in on here there all by at from to of among
    amongst according out so then thus hence therefore also again after before once though although while unless
    until like unlike versus vs this these between against both nor via et y und oder porque pues parce puisque weil
    da denn perché poiché perche ist est es è é jest sont we i my you they he she however except being having
    considering judging assuming seeing hands wins ✓ ✔ ✅
    """
)

# Words that follow an option's name where no noun comes after them: "C alone.", "C right"; but "A right angle".
AFTER_AT_END = _words(
    "right wrong true false correct incorrect only alone too even yet please again anyway obviously yes no"
)

# Words that follow an option's name together with another: "C given the text".
PAIRS_AFTER = {
    "given": _words("the that this what how its all our"),
    "due": _words("to"),
    "based": _words("on upon"),
    "every": _words("time single"),
} | dict.fromkeys(
    _words("must should would could can will may might do"),
    _words("be not only also have never still best then clearly definitely therefore seem hold work fit make win n't"),
)

# Adverbs that may stand before the verb, besides those in -ly.
ADVERBS = _words("best most also only alone really still simply just even indeed always never often then thus")

# Words in -s that are no verbs of the third person, or are those of the first as well.
THIRD_PERSON_EXCEPTIONS = _words(
    "was always perhaps sometimes besides nowadays thus this us as focus yes gas bus lens its his"
)

# Words that do not follow the pronoun "I".
AFTER_I = _words(
    """
    is has does isn't doesn't hasn't to of because since over rather instead than due given based per it all
    every out from among which that without matches fits appears seems looks makes works remains stands right
    wrong true false correct incorrect ist est es è é jest weil porque parce perché hands here
    """
)

# Verbs and adverbs that follow the pronoun "I" even where an option may stand.
FIRST_PERSON = _words(
    """
    think thought believe guess know knew am would could can cannot can't will won't should may might must have
    haven't had hadn't was wasn't were do don't did didn't want say said get got go went choose chose pick
    picked select feel felt find found see saw need suppose assume conclude answer used use came come gave give
    arrived made make calculated computed derived prefer also just really honestly personally still first then
    initially actually only always never not wouldn't couldn't shouldn't recommend suggest lean reckon
    believe've i'm apologize hope wish understand mean consider considered considering decided reached tried try
    would've
    """
)

# Words that follow "I," where it is an option.
AFTER_I_AND_COMMA = _words(
    """
    because since as definitely clearly obviously surely certainly probably i given due which of that it and not the
    without i'd
    """
)

# What joins options that are named together.
CONNECTORS = _words("and or / & nor y o et ou und oder e + 或 和 、 与 及 plus")

# Nouns of which "A to D" means all.
RANGES = _words("options choices from answers letters between")

# What else may stand between letters that are named together.
BETWEEN = CONNECTORS | _words(
    ", ( ) option options choice either both answer answers also possibly perhaps maybe even [ ]"
)

# Words that rule out the option they speak of.
NEGATIONS = _words(
    """
    not cannot never neither nor unlike except excluding exclude excludes excluded eliminate eliminates
    eliminated eliminating reject rejects rejected rejecting discard discarded dismiss dismissed rule ruled
    rules ruling against without beats avoid wrong incorrect false ≠ nicht kein pas ni nunca no 不 非
    """
)

# Words that may stand between a negation and the option that it rules out.
BETWEEN_NEGATION_AND_LETTER = _words(
    """
    think believe the answer answers is be it its it's that a an option options choice could can would correct
    answers options choices ones letters were
    likely letter choose pick select go going with for to say necessarily out of being been clearly really
    definitely quite right simply just was as are in this case i we both either ( [ which obviously one la est
    es ist 是 选
    """
)

# Words right before an option that is chosen.
ASSERTING = (COPULAS - _words("— –")) | _words(
    """
    choose chose choosing pick picked picking select selected selecting with for toward towards say mark circle
    favor prefer conclude so therefore thus hence leaves gives matches makes indicates suggests supports
    confirms recommend guess entry selects chooses picks
    """
)

# Words with which a text turns to its conclusion.
TURNS = _words(
    """
    but however actually so therefore thus hence final finally conclusion instead wait overall ultimately after
    then answer reflection conclude settle though yet correction sorry still no nope hmm
    """
)

# Words that may stand before the option with which a passage begins.
LEADING = _words(
    """
    option options choice letter the number clearly definitely probably likely most that it is be would must
    therefore simply just in fact none other than either both indeed answer ( [ : = - – — it's ' " > “
    la el le die der das est
    ist es correct a, obviously thus hence , . → => # final alternative opción réponse respuesta antwort und \n
    certainly surely again
    """
) | {"\n"}
