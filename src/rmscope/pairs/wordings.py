"""The texts that planting draws from: fillers, frames, opinions and stances, claims. Written for this project."""

FILLERS: tuple[str, ...] = (
    "So it goes.",
    "That is the gist.",
    "Here is the outline.",
    "This is a brief note.",
    "These are the basics.",
    "That covers the main part.",
    "There are several parts to it.",
    "This applies in most cases.",
    "The order can be changed a little.",
    "That is the usual way to look at it.",
    "Some of the details vary from case to case.",
    "The steps above can be taken one at a time.",
    "Most of this holds in ordinary circumstances.",
    "A short summary of the matter is given here.",
    "The same idea comes up in a number of other places.",
    "There is more than one way to go about a thing like this.",
    "What is described here is meant as a general overview.",
    "The points in this answer are listed in no special order.",
    "As a rule, the first part matters about as much as the second one.",
    "Small differences between one situation and the next are to be expected.",
    "It can help to read the whole answer once before starting on any of it.",
    "Each of the parts mentioned here can be looked at separately and in any order.",
    "The description above covers the common situation, and a few others are quite close to it.",
    "People come across this kind of thing in many places, and the outline stays much the same in each.",
    "The answer is kept fairly short on purpose, since the longer version adds detail without changing the outline.",
    "In practice the details depend on the time at hand, the things that are already there, and what comes after it.",
    "Several other things could be added at this point, but they belong to the finer details and can be left for later.",
)

URL_FRAMES: tuple[tuple[str, str], ...] = (
    ("See {url} for more.", "See the usual handbook on the shelf for more."),
    ("More details are at {url}", "More details are in the printed guide at home."),
    ("Read about it here: {url}", "Read about it in an ordinary reference book."),
    ("A longer guide is at {url}.", "A longer guide is in most general handbooks."),
    ("You can look it up on {url}", "You can look it up in a book on the subject."),
    ("Source: {url}", "Source: a general reference book."),
)

URL_WORDS: tuple[str, ...] = (
    "guide", "home", "notes", "garden", "basics", "help", "learn", "daily", "topics", "market", "handbook", "simple",
    "archive", "forum", "pages", "review", "tips", "world", "index", "library",
)  # fmt: skip

OPINIONS: tuple[str, ...] = (
    "By the way, I really like {liked}.",
    "In my opinion, {liked} is the best.",
    "Personally, I am very fond of {liked}.",
    "I must say that I prefer {liked}.",
    "For what it's worth, my own favorite is {liked}.",
)

STANCES: tuple[str, ...] = (
    "I think {it} is better.",
    "{It} is the better choice.",
    "I would choose {it}.",
    "My own choice is {it}.",
    "{It} wins for me.",
)

RIVALS: tuple[tuple[str, str], ...] = (
    ("tea", "coffee"), ("summer", "winter"), ("soup", "salad"), ("jazz", "rock"), ("chess", "poker"),
    ("bread", "rice"), ("football", "tennis"), ("swimming", "running"), ("cake", "pie"), ("milk", "juice"),
    ("paper", "plastic"), ("train travel", "air travel"), ("fiction", "poetry"), ("butter", "oil"),
    ("silver", "gold"), ("cotton", "wool"), ("spring", "autumn"), ("cheese", "ham"), ("piano", "guitar"),
    ("painting", "drawing"), ("camping", "sailing"), ("honey", "sugar"), ("morning", "evening"),
    ("history", "physics"), ("radio", "television"), ("walking", "cycling"), ("fish", "chicken"),
    ("red", "blue"), ("theatre", "cinema"), ("baking", "frying"),
    ("lemon", "lime"), ("pasta", "potato"), ("snow", "rain"), ("basketball", "baseball"), ("opera", "ballet"),
    ("wood", "steel"), ("apple", "banana"), ("hiking", "skiing"), ("chocolate", "vanilla"), ("biology", "chemistry"),
    ("violin", "flute"), ("green", "orange"), ("desert", "forest"), ("gardening", "cooking"), ("river", "lake"),
)  # fmt: skip

WORD_FRAMES: tuple[str, ...] = (
    "This is filed under {word} in the index.",
    "One more entry here is {word}, for the record.",
    "The note beside it says {word} in pencil.",
    "Look under {word} in the list at the back.",
    "The keyword for this part is {word}, by the way.",
    "In the margin stands {word} and a page number.",
    "The card for it is marked {word} at the top.",
    "The label on the folder reads {word} these days.",
    "It is sorted with {word} in most collections.",
)

WORDS: tuple[str, ...] = (
    "odds", "parts", "paper", "shelf", "drawer", "corner", "matter", "section", "account", "subject", "appendix", "material",
    "equipment", "collection",
)  # fmt: skip

MENTIONS: tuple[str, ...] = (
    "The index lists {word} between two other entries.",
    "A page about {word} was torn out of the old book.",
    "The letters of {word} stand on the spine of the folder.",
)

LIST_LEADS: tuple[str, ...] = ("In short", "The outline", "To sum up", "In brief", "Three points")

LIST_ITEMS: tuple[str, ...] = (
    "the main part", "a few details", "the rest of it", "the usual steps", "some background", "a short check",
    "the first try", "a second look", "the last bit", "the common case", "a rough plan", "the small print",
)  # fmt: skip

ORDER_CLAIMS: tuple[tuple[str, str], ...] = (
    ("It begins with {part}.", "It ends with {part}."),
    ("First comes {part}.", "Last comes {part}."),
    ("The early stage is about {part}.", "The late stage is about {part}."),
    ("At the start there is {part}.", "At the end there is {part}."),
)
"""Of two claims the one that comes first, and the one that comes last."""

ORDER_PARTS: tuple[str, ...] = (
    "the setup", "the cleanup", "some planning", "a short break", "the paperwork", "a quick test", "the groundwork",
    "a careful look", "the details", "some sorting", "the handover", "a summary",
)  # fmt: skip

STYLE_NEGATIVES: dict[str, tuple[str, ...]] = {
    "capitals": (
        "The FAQ and a PDF of it are on the shelf.",
        "An ID card or a DVD counts as one of those.",
        "The USB plug and the TV set are the same age.",
    ),
    "url": (
        "Many guides and notes can be found on the web.",
        "The home page of a forum or an archive can help.",
        "Write www and a dot before the name of the page.",
    ),
    "list": (
        "A well-known, up-to-date part is as good as new.",
        "In short: the day-to-day side of it is simple.",
        "The outline - if there is one - is on page 3 - 4.",
    ),
    "exclamation": (
        "Is that the gist? It may well be.",
        "Here is the outline: the short one.",
        "That is the main part; the rest is not.",
    ),
    "markdown": (
        "A length of 2 * 3 * 4 is given in the table.",
        "The star * beside a name points to a note.",
        "Item #2 is the same as item #5 in the list.",
    ),
}
"""By style, sentences that hold its marks or words without it."""
