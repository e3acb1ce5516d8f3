"""Sentences to calibrate on, and others to measure on: of many lengths, subjects and registers."""

CALIBRATION = """
The cat sat on the windowsill and watched the rain.
Quarterly revenue rose by eleven per cent, driven by exports to South America.
How do I reset the password of my home router?
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.
He scored twice in the last five minutes of the match.
Add two eggs, a cup of flour and a pinch of salt, then whisk until smooth.
The defendant was found not guilty on all counts.
Call me tomorrow.
A binary search tree keeps its keys in order.
The museum is closed on Mondays and on public holidays.
Never before had she seen such a clear night sky, with the Milky Way stretched from one horizon to the other.
Patients who took the drug reported fewer headaches than those who took the placebo.
I am so happy for you!
The train to Manchester leaves from platform seven at 9:42.
Inflation erodes the purchasing power of savings.
Two dogs chase a red ball across the snow.
Please find attached the minutes of last week's meeting.
The treaty, signed in 1648, ended thirty years of war in central Europe.
Why is the sky blue?
This vacuum cleaner is loud, heavy and does not pick up pet hair; I sent it back.
Electrons occupy orbitals of increasing energy around the nucleus.
A woman plays the violin in an empty subway station.
Turn left after the bridge and drive for another three kilometres.
The novel's narrator cannot be trusted, and that is what makes it a pleasure to read twice.
Your package was delivered at 14:05 and left with a neighbour.
Gradient descent follows the negative gradient of the loss.
My grandmother taught me to knit when I was six.
The volcano erupted without warning, covering the villages below in ash.
Is there a vegetarian option on the menu?
Bees communicate the direction of flowers by dancing.
The committee postponed its decision until the budget is approved.
Ouch, that hurt.
In a large bowl, combine the chopped tomatoes, basil, olive oil, garlic and vinegar, and let it stand for half an hour.
Unemployment fell to its lowest level in two decades.
Children are building a sandcastle on the beach.
The function returns null when the key is missing, so check for it before use.
Glaciers store most of the world's fresh water.
He whispered something to the driver, and the car turned around.
Which team won the championship in 1998?
The new phone has a brighter screen and a longer battery life, but it costs twice as much as the last one.
""".strip().splitlines()

HELD_OUT = """
A monkey is playing drums.
Someone in a gorilla costume is playing a set of drums.
A man is eating food.
A man is eating a piece of bread.
The orchestra tuned their instruments before the conductor came in.
Interest rates were left unchanged for the third month in a row.
What time does the pharmacy on the corner close?
Mitochondria produce most of the energy that a cell needs.
She missed the penalty, and the stadium fell silent.
Simmer the lentils for twenty minutes, then stir in the spinach and a squeeze of lemon.
The court ruled that the contract was void.
See you soon.
A hash table gives constant expected time for a lookup.
The ferry does not run in winter because of the ice.
He had walked that road a thousand times, yet on this grey morning every tree and fence seemed strange to him.
The vaccine reduced the number of severe cases by about ninety per cent.
What a wonderful surprise!
Flight 208 to Lisbon is delayed by forty minutes.
The central bank sold foreign currency to support the exchange rate.
A child in a yellow raincoat jumps into a puddle.
Could you send me the signed form by Friday?
The city was founded by Phoenician traders almost three thousand years ago.
Do penguins have knees?
The headphones broke after a week, but the shop replaced them at once without asking for a receipt.
Neutrinos pass through the Earth almost without interacting.
An old man feeds pigeons in the park.
Take the second exit at the roundabout and park behind the church.
The film is too long by half an hour, though its last scene is unforgettable.
Your subscription ends on the first of March.
Dropout randomly sets activations to zero during training.
We painted the kitchen green last summer.
The river burst its banks after a week of heavy rain.
Does this soup contain nuts?
Octopuses can change the colour of their skin in less than a second.
Parliament passed the bill with a narrow majority.
Be careful, the plate is hot.
To change the tyre, loosen the nuts, lift the car with the jack, take the wheel off, and fit the spare one.
House prices have doubled in ten years.
Students are reading quietly in the library.
The loop never ends, since the counter is reset inside it.
""".strip().splitlines()
