"""Words and sentences that recall tasks are made of."""

from __future__ import annotations

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""The haystack of the passkey task and of RULER's first."""

_ADJECTIVES = """
able agile amber ancient ardent austere bashful bitter blank bold brave brief bright brisk broad bronze calm careful
cheerful chilly civil clever cloudy coarse cool coral crisp curious daring deep dense distant dry dusty eager early
earnest elastic elegant faint famous fancy fearless feeble festive fierce fine firm flat fluid fond formal fragile
frank free fresh frosty gentle giant glad glossy golden graceful grand grave hardy hasty hollow honest humble icy
idle ivory jolly keen kind large late lavish lazy light little lively lofty loose loud lucid lucky lunar mellow
merry mild misty modest narrow neat noble novel odd opal pale patient plain polite prompt proud quick quiet rapid
rare ready rosy rough round royal rustic sandy secret serene sharp shy silent silver simple sleepy slim smooth sober
soft solar solid spare steady steep stern still stout strict sturdy subtle sunny swift tall tame tender thin tidy
timid tiny tough tranquil upright urban vague vast velvet vivid warm wary wild wise witty young zealous
"""
ADJECTIVES = tuple(_ADJECTIVES.split())

_NOUNS = """
acorn anchor anvil apron arch arrow badge bagpipe balcony banner barley barrel basket beacon bell bench bottle
bridge broom bucket button cabin candle canoe canyon carpet castle cedar cellar chapel cherry chisel cliff clock
clover cobweb comet compass copper cottage cradle crater cricket crown curtain dagger daisy desert dome donkey drum
eagle easel ember engine falcon feather fence ferry fiddle flute forest fountain galaxy garlic gate glacier glove
goblet granite grape hammer harbor harvest hazel helmet heron hinge honey island jacket jungle kettle kite ladder
lagoon lantern lemon lever lily lizard magnet mango maple marble meadow mirror mitten monsoon mosaic mountain needle
oasis ocean olive orchard otter paddle palace parrot pebble pepper piano pillow planet plum pocket prairie pulley
pumpkin quarry quartz quilt rabbit raft ribbon river rocket saddle sail salmon sandal saucer scarf shovel sparrow
spindle spoon stable statue sunset table temple thimble thistle thunder tower trumpet tunnel turnip valley vessel
village violin walnut wagon waterfall whistle willow window yarn
"""
NOUNS = tuple(_NOUNS.split())
