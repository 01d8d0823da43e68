"""The English words of the mini vocabulary, by what the grammar of haystacks and templates needs.

Order within a list has no meaning: ids follow the alphabet. A list that changes changes ids, so a
trained model needs the lists it was trained with.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words("""
account actor air animal answer apple arm army art aunt author autumn baby bag ball band bank barn
beach bear bed bell bird board boat body bone book border bottle bowl box boy branch bread breakfast
brick bridge brother bucket building bus business butter cabin cake camera camp candle car card cart
castle cat center chain chair child church circle city class cliff clock cloth cloud coach coal
coast coat coffee coin color column common copper corn corner cotton council country couple court
cousin cover cow crown cup customer dance daughter day desk dinner doctor dog door dress eagle ear
earth egg engine evening event eye face factory family farm farmer father feather fence field film
finger fire fish flag floor flour flower food foot forest fox friend fruit garden gate gift girl
glass glove goat gold grain grass group guest guide hall hand hat head heart hill horse hotel hour
house ice idea iron island jacket jar job journey judge key king kitchen knee knife lady lake lamp
land law leaf lesson letter library light line lion list lunch machine mail map market master matter
meal meat metal milk mill mind minute mirror money month moon morning mother mountain mouse mouth
music name neighbor net night nose note number office oil orange owner page paint pair paper park
party passage path pen pencil people person picture pig pilot place plan plane plant plate pocket
poem poet point pool port pot potato price prince prison queen rabbit rain range record report rice
ring river road rock roof room root rose salt sand scale school science sea seat secret seed sheep
sheet ship shirt shoe shop sign silk silver sister sky smoke snake snow soap society soldier son
song soup spring square stage star station stone store storm story stranger street student sugar
summer sun table teacher team temple tent test ticket tiger tool tower town toy train tree trip
truck uncle valley village voice wall watch water wave weather week wheel wind window wine wing
winter woman wood word worker world writer yard year
""")

VERBS = _words("""
asked ate became began bought broke brought built called came carried caught changed cleaned climbed
closed cooked counted covered crossed cut drank drew drove fell felt filled finished followed forgot
found gave grew heard held helped hid hoped joined jumped kept knew laughed learned left liked lived
looked lost loved made met missed moved needed noticed opened paid painted passed planned played put
ran reached read remembered rested said sang sat saw sent showed slept sold spoke stayed stood
stopped studied talked taught thought threw told took touched traveled tried turned used visited
waited walked wanted washed watched went won wore worked wrote
""")

ADJECTIVES = _words("""
big blue brave bright brown busy calm clean clever cold cool dark deep dry early empty fair famous
fast fine flat fresh full gentle golden good grand gray great green happy hard heavy high hot huge
hungry kind large late lazy little lonely long loud low lucky new nice noisy old open orange plain
poor pretty proud purple quick quiet rare red rich ripe round sad safe sharp short shy silent simple
slow small smooth soft strange strong sweet tall tired warm weak wet white wide wild wise wooden
yellow young
""")

ADVERBS = _words("""
again almost alone already also always away back carefully daily finally here later never next often
once outside quickly quietly slowly sometimes soon still suddenly then there today together tomorrow
twice usually well yesterday
""")

FUNCTION = _words("""
a about above across after all along among an and any are around as at be because before behind
below beside between both but by can could did do does down during each every few first for from go
had has have he her him his how i if in inside into is it its last least less many me more most much
my near no not nothing now of off on one only or other our out over own same she since so some than
that the their them these they this those three through to too toward two under until up upon us
very was we were what when where which while who whom whose why will with without would you your
""")

TEMPLATE = _words("""
answer appear assigned baker belongs born bought capital chess choice choose chose code coded codes
color colour company contains cook copied copies copy dancer data days doctor document driver eighth
end entries entry equal equals exactly fact farmer favorite fifth file find following found four
fourth frequent gave given goes hobby hold holds hop item items job keys know label labels lawyer
lists lives located magic mean memory mention mentioned name named names notes numbers occur option
options order owns painter password passwords pet pin project question recall recite registered
registry remember repeat result roads said sailor second session seventh singer sixth special starts
stored tag tags teacher tell tennis text think third times topic user valid value values variable
variables version visit visited word words work works write writer written year
""")

CAPITALISED = _words("""
A According After All An And As At Before But By Copy Data Document Each End Entry Every Find For
From Give He Her Here His How I If In It Item Let List Look My Name Near No Not Note Now On Once One
Only Option Or Our Passage Please Poem Recall Recite Remember Repeat Say Session Set She Since So
Some Tell That The Their Then There These They This To Today Under VAR We What When Where Which
While Who Write You
""")

STARTERS = _words("""
According All Choose Do Find For From Give How In List Name Now Of Please Recall Recite Repeat Say
Tell The To What When Where Which Who Write
""")
"""Words that also begin a message, with no space before them."""

LETTERS = ("A", "B", "C", "D")
"""Choices of a multiple-choice question."""

MARKS = (" (", ' "', " [", " ]", " =", " +", " -", " ->", " :", " #", " /", "...", "'s", "),")
"""Punctuation beside the 256 bytes that has an id of its own."""
