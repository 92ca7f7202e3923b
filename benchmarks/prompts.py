"""32 prompts of four kinds for measurements of decoding; none is part of the adapters' training text."""

PROMPTS = {
    "prose": [
        "Once upon a time, in a small village near the sea, there lived",
        "The history of the Roman Empire begins with",
        "A good breakfast is important because",
        "She opened the door and saw",
        "The ocean covers most of the Earth's surface, and",
        "In the winter of 1914, the soldiers",
        "My grandmother always said that",
        "Climate change affects agriculture in several ways.",
    ],
    "code": [
        "def fibonacci(n):\n",
        "import math\n\ndef area_of_circle(radius):\n",
        "class Stack:\n    def __init__(self):\n",
        "for i in range(10):\n    ",
        "def read_lines(path):\n    with open(path) as file:\n",
        "SELECT name, age FROM users WHERE",
        "function add(a, b) {\n",
        "try:\n    value = int(text)\nexcept",
    ],
    "questions": [
        "Question: What is the capital of France?\nAnswer:",
        "Q: Why is the sky blue?\nA:",
        "What is photosynthesis?",
        "How do I cook rice?",
        "Question: Who wrote Hamlet?\nAnswer:",
        "What are the benefits of exercise?",
        "Q: How many days are in a year?\nA:",
        "Explain what a computer is.",
    ],
    "lists": [
        "Ten things to pack for a trip:\n1.",
        "The planets of the solar system are:\n-",
        "Ingredients:\n- 2 cups of flour\n-",
        "Steps to change a tire:\n1.",
        "The following countries are in Europe:\n1.",
        "Tips for learning a language:\n1.",
        "Shopping list:\n- milk\n-",
        "Here are some popular sports:\n1.",
    ],
}
