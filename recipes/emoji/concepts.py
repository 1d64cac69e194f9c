"""What is taught, and what is held out."""

from __future__ import annotations

from pathlib import Path

STYLES = ("3d", "flat", "line", "noto", "blob")


def names(text: str) -> tuple[str, ...]:
    """Splits a wrapped list of names."""
    return tuple(" ".join(text.split()).split(", "))


CORE = names(
    """
    red apple, green apple, banana, strawberry, cherries, lemon, watermelon, grapes, pineapple, tomato, carrot,
    eggplant, avocado, mushroom, pizza, hamburger, french fries, hot dog, doughnut, cookie, ice cream, birthday cake,
    candy, lollipop, egg, hot beverage, grinning face, crying face, angry face, smiling face with heart-eyes, smiling
    face with sunglasses, winking face, clown face, ghost, skull, robot, alien, pile of poo, grinning cat, cat face, dog
    face, panda, pig face, cow face, rabbit face, mouse face, tiger face, frog, bear, fox, koala, lion, octopus,
    tropical fish, whale, crab, snail, turtle, lady beetle, butterfly, honeybee, baby chick, penguin, owl, red heart,
    yellow heart, green heart, blue heart, purple heart, broken heart, sunflower, tulip, rose, cactus, evergreen tree,
    four leaf clover, maple leaf, sun, crescent moon, star, cloud, rainbow, fire, snowflake, droplet, umbrella, house,
    automobile, bus, rocket, airplane, sailboat, bicycle, soccer ball, basketball, balloon, wrapped gift,
    jack-o-lantern, crown, light bulb, key, bell, locked, closed book, t-shirt, gem stone, trophy, alarm clock, camera,
    bomb
    """
)
"""The concepts of the small model, and of the measure."""

HELD_OUT = tuple(
    tuple(line.split("\t")) for line in (Path(__file__).parent / "held_out.tsv").read_text(encoding="utf-8").splitlines()
)
"""The 60 pairs of concept and style that no model of the recipe sees."""
