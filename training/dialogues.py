"""Writes the dialogues that the demo model learns from; all of the text is our own.

Each intent has patterns to train on and patterns that are held out: evaluate.py asks only the latter. In a pattern,
`(a|b)` is a choice, an empty choice leaves the words out, and `{x}` is filled with the subject.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field


def _words(text: str) -> list[str]:
    return text.split()


BOS_TEXT = "<s>"
SEED = 20261120  # of the training; other programs draw with seeds of their own

# --------------------------------------------------------------------------------------------------------------
# Fixed answers. Each entry: name -> (answer, words that a right answer must contain).

SEA = (
    "The sea covers more than two thirds of our planet, and it is never still. Wind draws its waves, the moon lifts its "
    "tides, and slow currents carry warmth from the equator to the cold shores of the north. Near the surface, where the "
    "light falls green and gold, tiny plants make much of the oxygen that we breathe. Far below, in the dark, whales sing "
    "to each other across hundreds of miles. People have always stood at its edge and listened: to the long breath of the "
    "water on the sand, coming and going, as if the whole earth were quietly asleep."
)
STORIES = {
    "lighthouse": "On a small island stood a lighthouse, and in it lived an old keeper named Mara. Every night she lit the "
    "lamp and counted the ships that passed. One night the fog was so thick that no ship could see the light. So Mara rang "
    "the bell, once every minute, until morning. When the fog lifted, a little boat lay safe in the bay. The sailor brought "
    "her a basket of oranges, and they watched the sun rise together.",
    "robot": "A small robot lived in a greenhouse and watered the plants. One day it found a seed that nobody had planted. It "
    "gave the seed a pot, some water and a place in the sun. Weeks passed, and nothing came. The robot waited, because "
    "waiting was something that it did well. Then, one morning, there was a green leaf, and the robot blinked its lamp three "
    "times for joy.",
    "fox": "A young fox wanted to know where the river goes. She followed it past the mill, through the wood and over the "
    'hills. On the third day she came to the sea, and the river was gone. "Where is it now?" she asked a gull. '
    '"Everywhere," said the gull. The fox listened to the waves for a while. Then she ran home to tell the others.',
}
POEMS = {
    "rain": "The rain came softly in the night\nand wrote its letters on the pane.\nI read them by the morning light:\nthe "
    "world is washed and new again.",
    "sea": "The sea says little, says it slow,\na word to come, a word to go.\nI wrote it down upon the sand;\nthe tide has "
    "read it, close at hand.",
    "stars": "The stars are lamps that no one lit,\nso far away, so small and clear.\nI look at them and think a bit,\nand "
    "all the quiet night draws near.",
    "mqtt": "A little word runs down the wire,\nfrom broker on to waiting ear.\nIt does not rest, it does not tire:\nwhat you "
    "have asked will soon be here.",
}
NO_SUCH_STORY = "I do not have a story about that, but here is one about a lighthouse. " + STORIES["lighthouse"]
NO_SUCH_POEM = "I do not have a poem about that, but here is one about the rain.\n" + POEMS["rain"]
UNKNOWN = (
    "I am sorry, I do not know that. I am a very small demo model: I can explain this project, count, tell a story or a "
    "poem, and remember your name."
)
NO_NAME = "You have not told me your name yet."
NO_CLOCK = "I have no clock. Offer me a tool named get_time with your request, and I will call it."
TOOL_FAILED = "I could not read the time: the tool reported an error."

EVENTS = {
    "queued": (
        (
            "queued means that the request has to wait. The event carries the position and the reason: waiting, loading or "
            "engine_restarting. It comes again when one of them changes."
        ),
        ("has to wait", "position"),
    ),
    "start": (
        (
            "start means that the request has a slot and the model begins. The event names the protocol version, the model "
            "and the worker."
        ),
        ("has a slot",),
    ),
    "progress": (
        (
            "progress comes while a long prompt is processed, at most twice a second. It counts tokens: processed, total "
            "and cached."
        ),
        ("processed", "total", "cached"),
    ),
    "chunk": (
        (
            "chunk carries a piece of new output in the field content, numbered by seq from 0 without a hole. Join the "
            "content of all chunks and you have the full answer."
        ),
        ("piece", "seq"),
    ),
    "ping": (
        (
            "A ping event is sent after 15 seconds without another event, to show that the request is alive. As a control "
            "action, ping asks the worker for its state; the answer is an ack."
        ),
        ("15 seconds", "state"),
    ),
    "snapshot": (
        (
            "snapshot answers a request that was sent again while it runs. It carries the content so far and next_seq; "
            "live chunks go on from there."
        ),
        ("sent again", "next_seq"),
    ),
    "done": (
        (
            "done ends a request that went well. It carries full_content, finish_reason, usage and timings, and it is marked "
            "final. Nothing follows it."
        ),
        ("full_content", "finish_reason"),
    ),
    "error": (
        (
            "error ends a request that failed. It carries a code, a message, and retryable, which says whether sending it "
            "again may help."
        ),
        ("failed", "retryable"),
    ),
    "rejected": (
        (
            "rejected answers a delivery and ends nothing: the request id belongs to another request, or the response "
            "topic is forbidden."
        ),
        ("ends nothing",),
    ),
    "ack": (
        "ack answers a control action. It repeats the action and says whether the status is ok or error.",
        ("control action", "status"),
    ),
}
COMMANDS = {
    "run": (
        (
            "lmd run starts the daemon. It connects to the MQTT broker, opens the engine and answers requests until you stop "
            "it."
        ),
        ("lmd run", "daemon"),
    ),
    "ask": (
        'lmd ask sends one prompt and prints the answer while it is written. Example:\nlmd ask "Tell me about the sea"',
        ("lmd ask", "one prompt"),
    ),
    "chat": (
        "lmd chat opens a conversation in the terminal. The worker keeps the history, so you can ask further.",
        ("lmd chat", "conversation"),
    ),
    "check": (
        (
            "lmd check tests the configuration, the broker, the permissions and the engine. It prints a table of what works "
            "and what to do about the rest."
        ),
        ("lmd check", "table"),
    ),
    "config": (
        (
            "lmd config prints the effective configuration and says where each value comes from. With --example it prints an "
            "example file, with --schema a JSON Schema."
        ),
        ("lmd config", "effective"),
    ),
    "demo": (
        (
            "lmd demo runs everything with this small built-in model, so that you can watch a stream of events without "
            "downloading anything."
        ),
        ("lmd demo", "built-in"),
    ),
}
CONTROLS = {
    "cancel": (
        (
            "cancel stops a running or waiting request; it ends with done and the finish_reason cancelled. Publish "
            '{"action": "cancel"} to llm/control/demo for the session demo.'
        ),
        ("cancel stops", "llm/control/demo"),
    ),
    "reset": (
        (
            'reset cancels what runs and forgets the history of the session. Publish {"action": "reset"} to '
            "llm/control/demo for the session demo."
        ),
        ("forgets the history", "llm/control/demo"),
    ),
    "delete": (
        (
            'delete removes the session altogether. Publish {"action": "delete"} to llm/control/demo for the session '
            "demo."
        ),
        ("removes the session", "llm/control/demo"),
    ),
    "history": (
        (
            'history returns the messages of the session, where the worker allows it. Publish {"action": "history"} to '
            "llm/control/demo for the session demo."
        ),
        ("returns the messages", "llm/control/demo"),
    ),
}

EVENT_FRAMES = [
    "(what is|what's|explain|describe|define) (the|a|an|) {q} event",
    "(what is|what's|explain|define) {q}",
    "what does (the event|the|an event|) {q} (event|message|) (mean|say|tell me|stand for)",
    "what does (the|) {q} (event |)mean (here|in this protocol|for my client|on the reply topic|)",
    "when (do i get|is|do you send|does the worker send|will i see) (the|a|an|) {q} (event|message|) (sent|published|)",
    "tell me about (the|) {q} (event|events|)",
    "i (got|see|received) (a|an|the|) {q} (event|message|) (what does it mean|what is that|why)",
    "(which|what) fields does (the|a|an|) {q} event (have|carry|contain)",
    "what is in (the|a|an|) {q} (event|message)",
    "{q} event",
    "{q} events",
    "meaning of (the event|) {q}",
    "(can|could) you explain (the|) {q} (event|message|) (to me|)",
    "(why|when) does (the|a|an|) {q} event (come|appear|arrive)",
    "what should i do (with|on) (a|an|the) {q} event",
    "type {q} (what does that mean|meaning|)",
    "(what is|what's) the (purpose|meaning|point) of (the|) {q} (event|message|)",
    "please describe what {q} means",
    "(i do not understand|i don't understand) (the|) {q} (event|message|)",
    "(how does|how do) (the|) {q} events work",
    "(do|should) i (have to|need to|) (care about|handle) {q} events",
]
EVENT_HELD = [
    "i would like to know what the {q} event is for",
    "please tell me what {q} means",
    "my client received the event {q}, what now",
    "give me an explanation of the {q} event",
    "what information does the {q} event give me",
    "could you describe the {q} event for me",
    "why do i see a {q} event on the reply topic",
]
COMMAND_FRAMES = [
    "(what does|what do) (the command |) lmd {x} (do|mean)",
    "(what is|what's|explain|describe) (the|) lmd {x} (command|)",
    "(what is|what's|explain|describe) the (sub-command|subcommand|command) {q}",
    "what does the (command|sub-command|subcommand) {q} do",
    "what does the {q} (command|sub-command|subcommand) do",
    "how (do i|can i|to) use lmd {x}",
    "how (do i|can i|to) use the {q} (command|sub-command|subcommand)",
    "(when|why) (do i|should i|would i) (use|need|run|call) lmd {x}",
    "lmd {x}",
    "tell me about (the command |) lmd {x}",
    "tell me about the {q} (command|sub-command|subcommand)",
    "what happens when i (type|enter|call|start) lmd {x}",
    "(what is|what's) (lmd {x}|the {q} command) (good |)for",
    "(can|could) you explain (lmd {x}|the {q} command) (to me|)",
    "the {q} command",
    "i do not understand (lmd {x}|the {q} command)",
    "(what is|what's) the purpose of lmd {x}",
]
COMMAND_HELD = [
    "i would like to know what lmd {x} does",
    "what can i do with lmd {x}",
    "please describe the command lmd {x} for me",
    "what is the use of the {q} command",
    "give me an explanation of lmd {x}",
]
CONTROL_FRAMES = [
    "(what is|what's|explain|describe) (the|) {q} (action|control action|control message)",
    "(what is|what's|explain|define) {q}",
    "what does (the|) {q} (action|control action|) (do|mean)",
    "what does the (action|control action) {q} do",
    "how (do i|can i|to) use (the|) {q} (action|control|)",
    "tell me about (the|) {q} (action|control action|)",
    "(control action|action) {q}",
    "{q} action",
    "how (do i|can i|to) send (a|an|the|) {q} (action|control message|)",
    "what happens (when|if) i send {q} (to the control topic|)",
    "(when|why) (should i|would i|do i) (send|use) {q}",
    "(can|could) you explain (the|) {q} (action|control action|)",
]
CONTROL_HELD = [
    "please tell me what the {q} action does",
    "i would like to know about the control action {q}",
    "what is the {q} control action good for",
    "give me an explanation of the {q} action",
    "what will {q} do when i send it",
]
CONTROL_EXTRA = {
    "cancel": [
        "how (do i|can i|to) (cancel|stop|abort|interrupt) (a|my|the|this) (running |) (request|answer|generation|stream)",
        "(i want to|i need to) (stop|cancel|abort) (a|my|the) (request|answer|generation)",
        "(can i|is it possible to) (stop|cancel) (you|a request|the answer)",
    ],
    "reset": [
        "how (do i|can i|to) (reset|clear|forget|empty) (the|my|this) (history|session|conversation|chat)",
        "(i want to|i need to) (clear|reset|forget) the (history|session|conversation)",
        "how (do i|can i) start (over|again|a new conversation)",
    ],
    "delete": [
        "how (do i|can i|to) (delete|remove|erase) (the|my|a) (whole |) session",
        "(i want to|i need to) (delete|remove|erase) (the|my|a) session",
    ],
    "history": [
        "how (do i|can i|to) (see|read|get|show|fetch) (the|my) (history|messages|old messages) (of a session|)",
        "(i want to|i need to) (see|read|get) the (history|messages of my session)",
    ],
    "ping": [
        "how (do i|can i) ping (the|) worker",
        "how (do i|can i) see if the worker is alive",
        "is the worker alive",
    ],
}
CONTROL_EXTRA_HELD = {
    "cancel": ["please tell me how to stop a running answer", "what do i send to cancel my request"],
    "reset": ["what do i send to clear the history", "please tell me how to forget the conversation"],
    "delete": ["what do i send to remove my session"],
    "history": ["what do i send to read the messages of a session"],
    "ping": [],
}


@dataclass(frozen=True)
class Info:
    """A question with one fixed answer."""

    answer: str
    expect: tuple[str, ...]
    train: tuple[str, ...]
    held: tuple[str, ...] = field(default=())


PUBSUB = 'mosquitto_sub -t llm/reply/demo -q 1\nmosquitto_pub -t llm/request/demo -q 1 -m "Hello"'
INFOS: dict[str, Info] = {
    "greeting": Info(
        "Hello! I am the demo model of llamacpp-mqtt-deploy. Ask me what I can do.",
        ("Hello", "demo model"),
        (
            "(hello|hi|hey|good morning|good evening|good afternoon|greetings|hi there|hello there|hey there)",
            "(hello|hi|hey) (you|model|friend|bot|assistant|again|everyone|robot|computer)",
            "hello (world|hello)",
            "(hi|hello) (nice|good) to (meet|see) you",
            "good day",
            "howdy",
            "hello, (anyone|anybody) (there|here|home)",
            "(are you|is anybody|is anyone) there",
            "(hello|hi), (i am here|here i am)",
            "test",
            "testing",
            "hello from (mqtt|my (phone|sensor|laptop|raspberry pi))",
            "i (just|only) (want|wanted) to say (hello|hi)",
            "(welcome|salutations|yo|hiya)",
            "good morning (to you|my friend|model)",
        ),
        (
            "hello to all of you",
            "good evening to you",
            "hello my friend",
            "a very good morning",
            "hello dear assistant",
        ),
    ),
    "how_are_you": Info(
        "I am well, thank you. All of my weights are in place. How can I help you?",
        ("I am well",),
        (
            "how are (you|things)",
            "how (do you do|are you doing|are you feeling)",
            "how is it going",
            "(what's up|how's it going|how's life)",
            "are you (well|okay|ok|fine)",
            "how do you feel (today|)",
            "how are you (today|this morning|doing today)",
            "how is (life|your day)",
        ),
        ("how are you doing this evening", "are you doing well", "how are you getting on"),
    ),
    "bye": Info(
        "Goodbye! Your session stays in the worker until it expires or you delete it.",
        ("Goodbye",),
        (
            "(bye|goodbye|good bye|see you|good night|farewell|bye bye|see you later|see you soon|ciao)",
            "(i have to|i must|i need to) (go|leave) (now|)",
            "that (is|was) all",
            "(that's|that is) it for (today|now)",
            "(talk|speak) to you (later|soon|tomorrow)",
            "i am leaving (now|)",
            "(bye|goodbye) (for now|my friend|model)",
            "have a (good|nice) (day|night|evening)",
        ),
        ("goodbye and until next time", "see you tomorrow", "have a nice evening, bye"),
    ),
    "thanks": Info(
        "You are welcome.",
        ("You are welcome",),
        (
            "(thanks|thank you|thx|many thanks|cheers)",
            "(thanks|thank you) (very much|a lot|so much|for that|for the answer|for your help|for the story)",
            "that (is|was) (very |) (helpful|great|good|nice|kind|clear)",
            "(great|nice|perfect|wonderful|good|cool), (thanks|thank you)",
            "(well done|good job|nice work|good answer)",
            "(that|this) helps (a lot|)",
            "i (like|love) (it|that|this)",
        ),
        ("thank you, that was very good", "great, thank you very much", "thanks for explaining"),
    ),
    "ok": Info(
        "Good. Ask me something else whenever you like.",
        ("whenever you like",),
        (
            "(ok|okay|yes|no|sure|fine|good|i see|understood|alright|right|yep|nope|maybe|great|cool|nice|interesting|wow)",
            "(ok|okay|yes), (i see|got it|understood|fine|good)",
            "got it",
            "i understand",
            "that (makes sense|is interesting)",
            "no (problem|more questions)",
            "(i am|i'm) (ready|done|tired|happy|bored|hungry|fine|sad|busy|back)",
        ),
        ("okay, that is clear", "yes, that makes sense", "sure, fine"),
    ),
    "who_are_you": Info(
        "I am the demo model of llamacpp-mqtt-deploy: a language model with fewer than two million parameters. My answers come "
        "to you over MQTT, chunk by chunk.",
        ("demo model", "two million"),
        (
            "who are you",
            "what are you",
            "(what is|what's) your name",
            "(tell me|say) (something |) about yourself",
            "introduce yourself",
            "(which|what) (model|llm) (are you|is this|do you use|answers me|is running)",
            "are you (a|an) (model|language model|bot|robot|program|ai|llm|person|human|machine)",
            "who am i (talking|speaking) to",
            "what (kind|sort) of (model|assistant|program|ai) are you",
            "do you have a name",
            "what (is|are) (this|the) (demo model|small model)",
            "are you (chatgpt|a human|real|a person|alive|conscious|intelligent)",
            "describe yourself",
            "what should i call you",
            "(what is|what's) the demo model",
        ),
        (
            "please introduce yourself to me",
            "tell me who you are",
            "what sort of thing are you",
            "am i talking to a machine",
            "what do they call you",
        ),
    ),
    "can_do": Info(
        "I can explain this project, its events and its commands, count, tell a short story or a poem, speak about the sea, "
        "remember your name, repeat words, and call a get_time tool when you offer one.",
        ("count", "get_time"),
        (
            "what can you (do|tell me|answer|explain|help with|say)",
            "what (are you able to|do you) (do|know)",
            "help",
            "help me",
            "(what are|show me|list) your (skills|abilities|features|talents|functions)",
            "how can you help (me|)",
            "what (may|can|should|could) i ask (you|)",
            "what do you know (about|)",
            "what (else|more) can you do",
            "(i need|can you|could you|can i get) (some |) help",
            "what (questions|topics|things) (do you know|can you answer|can i ask)",
            "what are you (good|made|useful) (at|for|)",
            "what is possible (here|)",
            "(what are you|what is this model) (able to do|for)",
            "give me (some |) (ideas|examples|suggestions)",
            "what now",
        ),
        (
            "tell me what you can do",
            "which questions can you answer",
            "what are you capable of",
            "how could you help me",
            "what sorts of things can you talk about",
        ),
    ),
    "project": Info(
        "llamacpp-mqtt-deploy puts a local language model on an MQTT bus. You publish a prompt to llm/request/SESSION and the "
        "daemon streams the answer as events to llm/reply/SESSION.",
        ("MQTT bus", "llm/reply"),
        (
            "(what is|what's|explain|describe) (this|the) project",
            "what is (llamacpp-mqtt-deploy|lmd|llamacpp mqtt deploy)",
            "what does (this|the) (project|program|software|daemon|package) do",
            "tell me about (this|the) (project|software|program)",
            "(tell me about|explain|describe) (llamacpp-mqtt-deploy|lmd)",
            "(what is|what's) (this|all this) (about|for|good for|)",
            "how does (this|it|the project|lmd|the daemon|the protocol) work",
            "(what is|what's|explain) (the daemon|the worker|the protocol)",
            "why (should|would) i use (this|lmd|this project|llamacpp-mqtt-deploy)",
            "(what is|what's) the (purpose|idea|point) of (this|the) project",
            "what does (lmd|llamacpp-mqtt-deploy) do",
            "where am i",
            "give me an overview (of the project|)",
            "what is a worker",
        ),
        (
            "please explain what this project is",
            "what is llamacpp-mqtt-deploy able to do",
            "give me an overview of this software",
            "i would like to know what this project does",
            "tell me how the project works",
        ),
    ),
    "events": Info(
        "The reply topic carries these events: queued, start, progress, chunk, ping, snapshot, done, error, rejected and ack. "
        "done or error ends a request. Ask me about any of them.",
        ("queued", "snapshot", "rejected"),
        (
            "(which|what) events (are there|exist|do you send|can i get|will i see|does the worker send|does the protocol have)",
            "(list|name|show me|tell me|explain|describe) (all |) (the |) events",
            "what (is an event|are events|are the events)",
            "(which|what) (messages|events) (come|arrive|are) on the reply topic",
            "what kinds of events (are there|exist)",
            "(which|what) event types (are there|exist|do you know)",
            "(list|explain|describe) the (event types|protocol events)",
            "how many events are there",
            "what comes on the reply topic",
            "events",
            "the events of the protocol",
            "what (does|will) the worker send (me|back|)",
        ),
        (
            "please list all events of the protocol",
            "which kinds of events are sent",
            "tell me about the events",
            "what events should my client know",
        ),
    ),
    "commands": Info(
        "lmd has these commands: run starts the daemon, ask sends one prompt, chat opens a conversation, check tests the setup, "
        "config prints the configuration, and demo shows everything with this model.",
        ("run", "check", "demo"),
        (
            "(which|what) (commands|sub-commands|subcommands) (are there|exist|does lmd have|do you have|can i use|are available)",
            "(list|name|show me|tell me|explain|describe) (all |) the (commands|sub-commands|subcommands|lmd commands)",
            "what are the (commands|sub-commands|subcommands) (of lmd|)",
            "how do i use (lmd|the command line|the program|llamacpp-mqtt-deploy)",
            "what (commands|sub-commands) does (llamacpp-mqtt-deploy|the program) (have|know|offer)",
            "commands",
            "lmd commands",
            "lmd help",
            "command line",
            "what can i type after lmd",
            "what can lmd do",
        ),
        (
            "show the list of lmd commands",
            "which commands can i type",
            "which sub-commands may i type",
            "tell me about the lmd commands",
        ),
    ),
    "controls": Info(
        'The control actions are cancel, reset, delete, history and ping. Publish {"action": "cancel"}, for example, to '
        "llm/control/demo; an ack comes back on llm/reply/demo.",
        ("cancel", "reset", "delete", "history"),
        (
            "(which|what) (control actions|actions|control messages) (are there|exist|do you know|can i send|does the worker know)",
            "(list|name|show me|explain|describe) (all |) the (control actions|actions|control messages)",
            "what (is|are) (a control action|control actions|the control actions)",
            "(what is|explain|what's) the control topic (for|)",
            "what can i send to (the control topic|llm/control)",
            "control actions",
            "how do i control (the worker|a session|you)",
            "tell me about (the |) control (actions|topic|messages)",
            "how does control work",
        ),
        (
            "please list all control actions",
            "which actions does the control topic accept",
            "what are the actions i can send",
        ),
    ),
    "pubsub": Info(
        "Subscribe first, then publish:\n" + PUBSUB + "\nThe events arrive on the reply topic, one line of JSON each.",
        ("mosquitto_sub -t llm/reply/demo", "mosquitto_pub -t llm/request/demo"),
        (
            "how (do i|can i|to) (use|try) (you|this|it|the worker) with (mosquitto|mosquitto_pub and mosquitto_sub|mosquitto_sub and mosquitto_pub|mqtt|the mosquitto tools)",
            "how (do i|can i|to) (send|publish) (a|my) (prompt|request|question|message) (over mqtt|with mqtt|with mosquitto|to the worker|)",
            "(what is|what's|explain) (mosquitto|mosquitto_pub and mosquitto_sub)",
            "how (do i|can i) (talk to|ask|reach) (you|the worker) (over mqtt|with mosquitto|from the shell|from the command line)",
            "(show me|give me) an example (with mosquitto|for mosquitto|of a request|)",
            "how (do i|can i) (test|try) (it|this) (by hand|from the shell|with mosquitto)",
            "mosquitto example",
            "mosquitto",
            "how do i use mosquitto",
            "how does my program (send a request|ask you something)",
            "how (do i|can i|to) (start|begin)",
            "how do i use (you|this)",
            "how do i (use|call) (you|the worker) over mqtt",
        ),
        (
            "please show me how to use mosquitto with you",
            "how would i send you a prompt with mosquitto",
            "give me a mosquitto example",
            "what do i type to ask you over mqtt",
        ),
    ),
    "pub": Info(
        'Publish a prompt with mosquitto_pub like this:\nmosquitto_pub -t llm/request/demo -q 1 -m "Tell me about the sea"\n'
        "The last level of the topic is the session.",
        ("mosquitto_pub -t llm/request/demo",),
        (
            "how (do i|can i|to) use mosquitto_pub (here|with this|with you|)",
            "(what is|what's|explain) mosquitto_pub (for|)",
            "mosquitto_pub",
            "mosquitto_pub example",
            "(show me|give me) (an example of|an example for|the) mosquitto_pub (command|line|)",
            "(which|what) mosquitto_pub command (do i need|sends a prompt)",
            "how (do i|can i) (publish|send) (a prompt|a request|something) with mosquitto_pub",
            "what do i (type|write) (for|after) mosquitto_pub",
        ),
        ("let me see the mosquitto_pub command", "how would i use mosquitto_pub", "tell me about mosquitto_pub"),
    ),
    "sub": Info(
        "Watch the answers with mosquitto_sub like this:\nmosquitto_sub -t llm/reply/demo -q 1\nAdd -v to see the topics, and use "
        "llm/reply/# for all sessions.",
        ("mosquitto_sub -t llm/reply/demo",),
        (
            "how (do i|can i|to) use mosquitto_sub (here|with this|with you|)",
            "(what is|what's|explain) mosquitto_sub (for|)",
            "mosquitto_sub",
            "mosquitto_sub example",
            "(show me|give me) (an example of|an example for|the) mosquitto_sub (command|line|)",
            "(which|what) mosquitto_sub command (do i need|shows the answer)",
            "how (do i|can i|to) (watch|see|read|receive|get|subscribe to) (the |) (answers|replies|events|reply)",
            "how (do i|can i) (watch|read) (answers|events) with mosquitto_sub",
            "what do i (type|write) (for|after) mosquitto_sub",
        ),
        ("let me see the mosquitto_sub command", "how would i use mosquitto_sub", "tell me about mosquitto_sub"),
    ),
    "topics": Info(
        "There are six topics: llm/request/SESSION for prompts, llm/reply/SESSION for events, llm/control/SESSION for actions, "
        "llm/admin/WORKER for operators, and the retained llm/status/WORKER and llm/health/WORKER.",
        ("llm/request", "llm/status"),
        (
            "(which|what) topics (are there|exist|do you use|does the worker use|do i need|are used)",
            "(list|name|show me|explain|describe|tell me about) (all |) the (topics|mqtt topics)",
            "(what is|what's) (the request topic|the reply topic|a topic)",
            "(on|to|under) (which|what) topic (do i|should i|can i) (send|publish|listen|subscribe|write)",
            "where (do i|should i) (send|publish) (my |a |) (prompts|prompt|requests|request)",
            "where (do|does) the (answers|answer|replies|reply|events) (come|go|arrive)",
            "topics",
            "what topics",
            "which topic is for (requests|prompts|replies|answers)",
        ),
        ("give me a list of the topics", "which mqtt topics does the daemon use", "tell me the topics"),
    ),
    "status": Info(
        "llm/status/WORKER is retained. It says whether the worker is online, draining or offline, and names its models, routes "
        "and limits. The broker sets offline when the worker is lost.",
        ("llm/status", "online"),
        (
            "(what is|what's|explain|describe) the status (topic|message)",
            "what is in the status (topic|message)",
            "how (do i|can i) (see|know|find out|tell) (if|whether) (the worker|you|the daemon) (is|are) (online|offline|running)",
            "status topic",
            "worker status",
            "what does the status (topic|message) (say|contain|mean)",
            "tell me about the status topic",
            "is the worker online",
        ),
        ("please tell me what the status topic holds", "how would i see whether the worker is online"),
    ),
    "health": Info(
        "llm/health/WORKER is retained and renewed every 30 seconds. It counts slots, waiting requests, tokens per second, errors "
        "and memory.",
        ("llm/health", "30 seconds"),
        (
            "(what is|what's|explain|describe) the health (topic|message)",
            "what is in the health (topic|message)",
            "how (do i|can i) monitor (the worker|you|the daemon)",
            "health topic",
            "worker health",
            "tell me about the health topic",
            "what does the health (topic|message) (say|contain|mean)",
            "how (busy|loaded) is the worker",
        ),
        ("please tell me what the health topic holds", "how would i monitor the worker"),
    ),
    "request": Info(
        "A request is plain text, which is the prompt, or a JSON object with one of prompt, messages or tool_results. Everything "
        "else, such as request_id, stream, max_tokens or tools, has a default.",
        ("plain text", "JSON"),
        (
            "what (does|is|should be in) a request (look like|)",
            "(which|what) fields (can|does) a request have",
            "(explain|describe) (the request|a request|requests|the request format|request fields)",
            "what (can|do|should) i (put|write) (in|into) a request",
            "(what is|what's) the (request format|format of a request)",
            "how (is|do i write) a (json |) request",
            "request format",
            "request fields",
            "which parameters can i (set|send)",
            "(what is|explain) (a|the) (prompt|payload) (field|)",
        ),
        ("please tell me how a request is written", "what goes into a request", "tell me the fields of a request"),
    ),
    "request_id": Info(
        "request_id names the stream and makes a request safe to send again: the same id with the same content runs at most once. "
        "The worker makes one when you leave it out.",
        ("request_id", "at most once"),
        (
            "(what is|what's|explain|describe) (the|a|) (request_id|request id)",
            "why (do i need|should i use|should i send) (a|the) (request_id|request id)",
            "what does (the|) (request_id|request id) do",
            "what is (the|) (request_id|request id) (for|good for)",
            "request_id",
            "how (do i|can i) name a request",
            "tell me about (the|) (request_id|request id)",
        ),
        ("what good is a request_id", "what would i use the request id for"),
    ),
    "session": Info(
        "A session is one conversation. Its name is the last part of the topic, for example llm/request/demo, and the worker keeps "
        "its history. Prompts of a session run one at a time.",
        ("one conversation", "history"),
        (
            "(what is|what's|explain|describe|define) (a|the) session",
            "what are sessions",
            "how do sessions work",
            "why (do i need|are there) (a session|sessions)",
            "session",
            "sessions",
            "(tell me about|explain) sessions",
            "how (do i|can i) (make|create|open|choose|name) a session",
            "do you (keep|have|remember) (the|a|our) (history|conversation|messages)",
            "(what is|what's) a session (name|path)",
            "do you have (a |) memory",
        ),
        ("please explain what a session is", "tell me how a session works", "how would i open a session"),
    ),
    "seq": Info(
        "seq numbers the chunk events of a request from 0 without a hole. The last event carries the next number and final: true. "
        "Ignore a chunk with a lower seq than you expect.",
        ("seq numbers", "without a hole"),
        (
            "(what is|what's|explain|describe) (the|) seq",
            "what does (the field |) seq (mean|do|count)",
            "(what is|what's) the (sequence number|field seq|seq field)",
            "seq",
            "why is there a (seq|sequence number)",
            "tell me about seq",
            "how are (chunks|the chunks) numbered",
        ),
        ("please explain the seq field", "what would i use seq for"),
    ),
    "streaming": Info(
        "Streaming means that the answer comes in chunk events while it is written. With stream: false only the last event comes; "
        'with stream: "sentence" whole sentences come.',
        ("while it is written", "stream: false"),
        (
            "(what is|what's|explain|describe) streaming",
            "how does streaming work",
            "(what is|what's) (a|the) stream",
            "how (do i|can i|to) (turn off|switch off|disable|use|enable) streaming",
            "what does (stream|the field stream|the stream field) (mean|do)",
            "(which|what) streaming modes (are there|exist)",
            "streaming",
            "tell me about streaming",
            "can i (get|have) the (whole |) answer (at once|in one piece)",
            "do you stream (your answers|)",
        ),
        ("please tell me what streaming is", "how would i switch streaming off", "tell me how streaming works"),
    ),
    "lost": Info(
        "After a lost connection, a hole in seq or a long silence, publish the same request again: the same id and the same bytes. "
        "You get a snapshot when it still runs, or its last event when it has ended.",
        ("same id", "snapshot"),
        (
            "what (do i do|happens|can i do) (when|if|after) (my|the) connection (is lost|breaks|drops|was lost)",
            "what (if|when) (i miss|i lose|a chunk is missing|there is a hole)",
            "how (do i|can i) (recover|resume|continue) (after a lost connection|a stream|a request|)",
            "i (lost|missed) (a chunk|some chunks|events|the connection)",
            "what (if|happens if) i (reconnect|send a request again|send it again)",
            "can i send (a|the same) request (again|twice)",
            "how (do i|should i) (retry|send again)",
            "how does (resuming|recovery) work",
        ),
        ("please tell me what to do after a lost connection", "what should i do when chunks are missing"),
    ),
    "errors": Info(
        "The error codes are bad_request, payload_too_large, model_not_found, unsupported, busy, session_busy, rate_limited, "
        "context_overflow, timeout, idle_timeout, engine_unavailable, engine_error, engine_lost, interrupted, shutting_down and "
        "internal.",
        ("bad_request", "busy", "internal"),
        (
            "(which|what) (error codes|errors|codes) (are there|exist|do you send|can i get|can happen)",
            "(list|name|show me|explain) (all |) the (error codes|errors|codes)",
            "what are the (error codes|errors)",
            "error codes",
            "what can go wrong",
            "tell me (about |) the error codes",
            "which codes can an error (have|carry)",
        ),
        ("give me a list of the error codes", "which error codes does the worker know"),
    ),
    "config_file": Info(
        "The configuration is a TOML file: --config FILE, else $LMD_CONFIG, else ./llamacpp-mqtt-deploy.toml, else "
        "/etc/llamacpp-mqtt-deploy/config.toml. Environment variables win over the file, and flags win over both.",
        ("TOML", "LMD_CONFIG"),
        (
            "where is the (configuration|config file|configuration file)",
            "how (do i|can i|to) (configure|set up) (it|this|the daemon|the worker|lmd|you)",
            "(what is|explain|what's) the (configuration|config) file",
            "(which|what) (configuration|config) file (is used|do you read)",
            "where (do i|can i) (change|put|set) (the |) (settings|configuration|options)",
            "configuration file",
            "settings",
            "(how are|where are) (settings|options) (read|stored|kept)",
            "(what are|which are) the settings",
        ),
        ("please tell me where the configuration file is", "how would i configure the daemon"),
    ),
    "env": Info(
        "Environment variables start with LMD_ and use two underscores for nesting: LMD_MQTT__HOST sets the broker, LMD_ENGINE__URL "
        "the engine.",
        ("LMD_MQTT__HOST",),
        (
            "(which|what) environment variables (are there|exist|can i use|do you read)",
            "how (do i|can i) (use|set) (an |) environment (variables|variable)",
            "environment variables",
            "how (do i|can i|to) (set|change|choose) the (broker|host|mqtt host)",
            "(what is|explain) (the prefix LMD_|LMD_MQTT__HOST)",
            "can i (configure|set) (it|this|you) (with|by|through) (the environment|environment variables)",
            "tell me about the environment variables",
        ),
        ("please list the environment variables", "how would i set the broker host"),
    ),
    "bigger": Info(
        "Give the engine another model: set engine.model_path to a GGUF file, or engine.url to a running llama-server. Any model "
        "that llama.cpp can load will do.",
        ("GGUF", "llama-server"),
        (
            "how (do i|can i|to) (use|load|run|try) (a|another|a bigger|a better|a larger|a real|my own|a different) model",
            "can i use (a|another|a bigger|a larger|my own|a better) model",
            "how (do i|can i) (change|switch|replace) (the|your) model",
            "(which|what) models (can i use|are supported|work)",
            "(i want|i need) a (bigger|better|larger|real) model",
            "where do i put my (model|gguf)",
            "do you support (llama-server|other models|bigger models|ollama)",
        ),
        (
            "please tell me how to use a larger model",
            "how would i load my own model",
            "is it possible to use a bigger model",
        ),
    ),
    "size": Info(
        "I have about 1.9 million parameters in 6 layers, a vocabulary of 1280 tokens and a context of 1024 tokens. My file is less "
        "than 4 megabytes.",
        ("1.9 million", "1024"),
        (
            "how (big|large|small) (are you|is this model|is the model|is your file|is the demo model)",
            "how many parameters (do you have|does this model have|are there|have you)",
            "how many (layers|tokens) (do you have|does the model have)",
            "(what is|what's) your (size|context|context length|vocabulary)",
            "how (long|large|big) is your context",
            "your size",
            "number of parameters",
            "are you (a |) (small|big|large) (model|)",
        ),
        (
            "please tell me how big you are",
            "how many parameters does the demo model have",
            "what is the size of your context",
        ),
    ),
    "trained": Info(
        "I was trained for this project with a script in its training folder, on a CPU in less than an hour, and only on dialogues "
        "that were written for it.",
        ("trained", "dialogues"),
        (
            "(how|where|when) were you (trained|made|built|created)",
            "who (made|trained|built|created|wrote) you",
            "what (data|text|texts) (were you trained on|did you learn from|do you know)",
            "who (is|are) your (maker|author|authors|creator)",
            "(what is|what's) your training data",
            "how did you learn (this|that|to speak|)",
            "where do you come from",
            "can i train (you|my own model|a model) (myself|)",
            "tell me about your training",
        ),
        ("please tell me how you were trained", "who was it that made you", "on what text were you trained"),
    ),
    "mqtt": Info(
        "MQTT is a light protocol for messages. Clients publish to topics, a broker passes the messages on, and whoever has "
        "subscribed to a topic receives them.",
        ("broker", "subscribed"),
        (
            "(what is|what's|explain|define) mqtt",
            "how does mqtt work",
            "(what is|what's|explain) (a|the) broker",
            "mqtt",
            "tell me about mqtt",
            "why (mqtt|do you use mqtt)",
            "what does mqtt (mean|do)",
            "(what is|explain) (publish and subscribe|a message bus)",
            "what is an mqtt broker",
        ),
        ("please explain mqtt to me", "could you describe mqtt", "i would like to know what mqtt is"),
    ),
    "qos": Info(
        "Use QoS 1: subscribe to the reply topic with QoS 1, wait until the broker confirms, then publish. The worker answers with "
        "QoS 1 and never retains a reply.",
        ("QoS 1",),
        (
            "(what is|what's|explain) (qos|qos 1|quality of service)",
            "(which|what) qos (do i need|should i use|do you use|is used)",
            "qos",
            "(why|when) (do i need|should i use) qos (1|0|2)",
            "are (replies|events|answers) retained",
            "tell me about qos",
            "does the worker retain (replies|answers)",
        ),
        ("please tell me which qos to use", "what qos would i need"),
    ),
    "llamacpp": Info(
        "llama.cpp is a program that runs language models on ordinary computers. It reads them from GGUF files; this project uses "
        "it as its engine.",
        ("llama.cpp", "engine"),
        (
            "(what is|what's|explain) (llama.cpp|llama cpp|llamacpp|llama-server|gguf|a gguf file|the engine|an engine)",
            "how does llama.cpp work",
            "llama.cpp",
            "gguf",
            "tell me about (llama.cpp|gguf)",
            "(which|what) engine (do you use|runs you|is used)",
            "why (llama.cpp|do you use llama.cpp)",
        ),
        ("please tell me what llama.cpp is", "could you describe gguf to me", "i would like to know what llama.cpp is"),
    ),
    "tools": Info(
        "Send a list of tools with your request. When the model calls one, done has the finish_reason tool_calls; answer with "
        "tool_results. I myself know only get_time.",
        ("tool_results", "get_time"),
        (
            "(what are|explain|describe) tools",
            "how (do|does) (tools|tool calls|tool calling|function calling|a tool call) work",
            "(what is|what's) (a tool|a tool call|tool calling|function calling)",
            "(which|what) tools (do you know|can you use|can you call|are there)",
            "how (do i|can i|to) (use|offer|send|give you) (tools|a tool)",
            "can you (use|call) (tools|a tool|functions)",
            "tools",
            "do you support (tools|function calling|tool calls)",
            "tell me about (tools|tool calls)",
            "(what is|explain) get_time",
        ),
        ("please explain tool calls", "how would i offer you a tool", "is it possible for you to call tools"),
    ),
    "language": Info(
        "I speak only English.",
        ("only English",),
        (
            "(do|can) you (speak|understand|know|write) (german|french|spanish|italian|chinese|japanese|dutch|polish|other languages|russian|arabic)",
            "(which|what) languages (do you speak|do you know|can you speak|do you understand)",
            "(hallo|guten tag|bonjour|hola|ciao|guten morgen|buenos dias|buongiorno)",
            "(wie geht es dir|wer bist du|was kannst du|qui es-tu|quien eres|como estas|comment allez-vous|wie heisst du|wie spaet ist es)",
            "translate (this|hello|it|the story) (to|into) (german|french|spanish|italian)",
            "speak (german|french|spanish)",
            "(please answer|answer|reply) in (german|french|spanish|italian)",
            "what language (is this|do you speak)",
        ),
        ("which language do you understand", "can you speak portuguese", "would you speak german with me"),
    ),
    "privacy": Info(
        "The model runs on your own machine, and your prompts go only through your own broker. They are not written to the log unless "
        "a setting asks for it.",
        ("your own machine",),
        (
            "(is|are) (my data|my prompts|my messages|this) (safe|private|secure)",
            "where (do|does) my (data|prompts|messages) go",
            "do you (store|save|log|send) my (data|prompts|messages)",
            "who can (read|see) my (prompts|messages|data)",
            "do you (need|use) the (internet|cloud)",
            "are you (online|in the cloud|on the internet|local)",
            "(is|does) (this|it|everything) (run|running) (locally|local|offline|on my machine)",
            "tell me about (privacy|security)",
            "do you work (offline|without internet|without the internet)",
        ),
        ("please tell me where my prompts go", "does everything stay on my machine", "could others read my messages"),
    ),
    "sea": Info(
        SEA,
        ("two thirds", "whales", "asleep"),
        (
            "tell me (about|something about|more about) the (sea|ocean|oceans)",
            "(what is|describe|explain) the (sea|ocean)",
            "(talk|speak|write) (to me |) about the (sea|ocean)",
            "(what do you know|what can you say|do you know anything) about the (sea|ocean)",
            "(the sea|the ocean|sea)",
            "(can|could) you (tell me|say|write) something about the (sea|ocean)",
            "i (love|like|miss) the (sea|ocean)",
            "what is the (sea|ocean) like",
            "(i want|i would like|i'd like) to (hear|know|learn) (something |more |) about the (sea|ocean)",
            "write (a few|some|a hundred) (words|lines|sentences) about the sea",
            "(let us|let's) talk about the sea",
        ),
        (
            "would you tell me about the sea",
            "please say something about the sea",
            "what can you tell me about the ocean",
            "i would enjoy some words about the sea",
            "please tell me a little about the sea",
        ),
    ),
    "story": Info(
        STORIES["lighthouse"],
        ("lighthouse", "Mara"),
        (
            "tell me a (short |little |nice |bedtime |good |) story",
            "(write|give me|i want|i would like) a (short |little |nice |) story",
            "(can|could|will) you tell (me |) (a|one) story",
            "a story",
            "story",
            "tell a story",
            "do you know (a|any) (story|stories)",
            "(i want to|i'd like to) hear a story",
            "tell me (a story|something) about (a|the) (lighthouse|old keeper|island|ship|lamp)",
            "(read|tell) (me |us |) (a|the) (bedtime |) story",
            "entertain me",
            "tell me a tale",
            "write a (story|tale) about a lighthouse",
            "make up a story",
        ),
        (
            "would you tell me a short story",
            "surprise me with a little story",
            "let me hear a story",
            "i am in the mood for a story",
        ),
    ),
    "story_robot": Info(
        STORIES["robot"],
        ("robot", "seed"),
        (
            "(tell me|write|give me|i want) a (short |) (story|tale) about (a|the|some) (small |little |) (robot|robots|machine|plant|seed|garden)",
            "(can|could) you tell (me |) a story about a (robot|machine|garden)",
            "a story (about|with) a robot",
            "(the |) robot story",
        ),
        ("would you tell me a story about a robot", "let me hear a story about a robot"),
    ),
    "story_fox": Info(
        STORIES["fox"],
        ("fox", "river"),
        (
            "(tell me|write|give me|i want) a (short |) (story|tale) about (a|the|some) (young |little |) (fox|foxes|animal|animals|river)",
            "(can|could) you tell (me |) a story about a (fox|river|animal)",
            "a story (about|with) a fox",
            "(the |) fox story",
            "(tell me |give me |) another (story|one|tale)",
            "(one|a|any) (more|other) story",
            "a different story",
            "do you know another story",
        ),
        ("would you tell me a story about a fox", "let me hear another story"),
    ),
    "poem": Info(
        POEMS["rain"],
        ("rain came softly",),
        (
            "(write|tell me|give me|recite|say|compose) (me |) a (short |little |nice |) (poem|verse|rhyme)",
            "(can|could|will) you (write|recite|tell me) (me |) a (short |) (poem|rhyme|verse)",
            "a poem",
            "poem",
            "do you know (a|any) (poem|poems|poetry)",
            "(i want|i would like|i'd like) (a|to hear a|to read a) (short |) poem",
            "(write|tell me|give me) a (short |) poem about (the |) (rain|weather|night|morning)",
            "poem about (the |) rain",
            "make a (poem|rhyme)",
            "poetry",
        ),
        (
            "would you write me a short poem",
            "surprise me with a little poem",
            "let me hear a poem",
            "i am in the mood for a poem",
        ),
    ),
    "poem_sea": Info(
        POEMS["sea"],
        ("sea says little",),
        (
            "(write|tell me|give me|recite|compose) (me |) a (short |) (poem|verse|rhyme) about the (sea|ocean|waves|beach|tide)",
            "(can|could) you (write|recite) (me |) a (short |) poem about the (sea|ocean)",
            "(a |) poem about the (sea|ocean)",
            "(a |) sea poem",
        ),
        ("would you write a poem about the sea", "let me hear a poem about the sea"),
    ),
    "poem_stars": Info(
        POEMS["stars"],
        ("stars are lamps",),
        (
            "(write|tell me|give me|recite|compose) (me |) a (short |) (poem|verse|rhyme) about (the |) (stars|star|sky|moon|night sky)",
            "(can|could) you (write|recite) (me |) a (short |) poem about the (stars|sky)",
            "(a |) poem about the (stars|sky)",
            "(tell me |give me |) another poem",
            "(one|a) (more|different) poem",
            "do you know another poem",
        ),
        ("would you write a poem about the stars", "please recite another poem"),
    ),
    "poem_mqtt": Info(
        POEMS["mqtt"],
        ("runs down the wire",),
        (
            "(write|tell me|give me|recite|compose) (me |) a (short |) (poem|verse|rhyme) about (mqtt|messages|a message|the broker|a broker|this project|yourself|the bus|computers)",
            "(can|could) you (write|recite) (me |) a (short |) poem about (mqtt|messages|this project)",
            "(a |) poem about (mqtt|messages)",
            "(an |) mqtt poem",
        ),
        ("would you write a poem about mqtt", "let me hear a poem about messages"),
    ),
}

# --------------------------------------------------------------------------------------------------------------
# Unknown questions: frames times topics, both with held-out members.

UNKNOWN_FRAMES = [
    "what is (the |a |an |) {t}",
    "what's {t}",
    "tell me about (the |a |an |) {t}",
    "tell me something about {t}",
    "who (invented|discovered|made|found) (the |) {t}",
    "how (does|do) (a |the |) {t} work",
    "why (is|are) (the |) {t} (so |) (important|famous|expensive|popular|dangerous|blue|loud|old|rare)",
    "where (can i find|can i buy|do i get|is|are) (the |a |) {t}",
    "explain {t} (to me|)",
    "how (do i|can i|to) (make|cook|build|repair|clean|draw|learn|grow) (a |the |) {t}",
    "what do you think (of|about) {t}",
    "do you (like|know|have|want) {t}",
    "how (old|big|tall|far|heavy|expensive|long) is (the |a |) {t}",
    "when (was|were) (the |) {t} (invented|built|born|discovered|made)",
    "what (color|colour|size|shape) is (the |a |) {t}",
    "(can|could) you (tell me about|explain|describe) (the |a |) {t}",
    "what is the (capital|population|history|price|weight|origin|meaning|name|area) of {t}",
    "who is the (president|king|queen|author|captain|owner|mayor) of {t}",
    "describe (the |a |) {t}",
    "(give me|write) (a summary|an essay|a report|a recipe|a song) (about|of|for) {t}",
    "how many {t} are there",
    "is (the |a |) {t} (good|bad|safe|healthy|true|edible|alive)",
    "what is the difference between {t} and {u}",
    "which is better, {t} or {u}",
    "compare {t} and {u}",
    "(show me|draw|find|send me) (a picture of |) {t}",
    "what (is|are) the (best|largest|smallest|fastest|oldest) {t} (in the world|)",
    "i (want|need|like|bought|saw) (a |the |) {t}",
    "how (was|is) the {t} (today|yesterday|)",
    "define {t}",
    "what happened (to|in|with) (the |) {t}",
    "who (was|is) {p}",
    "what did {p} (do|write|say|invent)",
    "when was {p} born",
    "tell me about {p}",
    "do you know {p}",
    "have you (read|heard of|met) {p}",
    "what is {m} (plus|minus|times|divided by) {n}",
    "what is {m} + {n}",
    "{m} * {n}",
    "calculate {m} (plus|times|minus) {n}",
    "how much is {m} (times|plus) {n}",
    "solve (x|y) + {m} = {n}",
    "what is the (square root|root|square) of {m}",
    "(turn on|turn off|switch on|switch off|open|close|dim) the {t}",
    "play (some |the |) {t}",
    "(order|buy|book|sell) (me |) (a |) {t}",
    "what is the weather (like |) (in {t}|today|tomorrow|)",
    "will it rain (today|tomorrow|in {t})",
    "(what are the|any|tell me the) news (about {t}|today|)",
    "who won (the |) {t} (yesterday|last year|)",
    "write (a |some |) (python|c|java|rust|javascript) (code|program|function) for {t}",
    "fix (this|my) {t}",
    "what is (the meaning of life|love|time|happiness|truth)",
    "(what day is it|what is the date|which year is it|what is today's date)",
    "why do {t} (exist|sleep|fly|grow|sing)",
    "can {t} (fly|swim|think|talk|dance)",
    "how do {t} (sleep|fly|grow|move|live)",
    "(should|can|may) i (eat|touch|buy|use|paint) (the |a |) {t}",
    "are {t} (real|animals|plants|dangerous|heavy)",
    "who wrote {t}",
    "recommend (a |me a |) {t}",
    "(what|which) {t} (should i|can i|do you) (choose|take|like|read)",
    "{t}",
    "tell me (a joke|a joke about {t}|a secret|a riddle)",
    "guess (my age|a number|what i think)",
    "what am i (thinking|doing|wearing|eating)",
    "how do i get to {t}",
    "what (time|day) does the {t} (open|close|start)",
    "what is the {w} event",
    "what does lmd {w} do",
    "explain the {w} command",
    "what does {w} mean",
    "what is (a |the |) {w}",
    "who is {w}",
    "where is {w}",
]
UNKNOWN_HELD = [
    "please tell me all about {t}",
    "i would like to know more about {t}",
    "would you explain {t} to me",
    "what makes {t} so special",
    "who was the first to see {t}",
    "how long does {t} last",
    "do people in {t} like {u}",
    "what would {p} say about {t}",
    "where does the word {t} come from",
    "could you help me with my {t}",
    "how much does a {t} cost",
    "is it true that {t} can swim",
    "what is {m} plus {n} minus {m}",
    "when will the {t} arrive",
    "who sells {t} near me",
    "which {t} was the first",
    "how can i learn {t} quickly",
    "what is the secret of {t}",
]
TOPICS = (
    "France Japan Brazil Egypt Canada Kenya India Peru Norway Italy London Paris Tokyo Cairo Berlin Rome Moscow Sydney Africa Europe Asia America mountain mountains desert forest jungle volcano planet moon Mars Venus Jupiter sun "
    "galaxy universe gravity electricity magnetism light sound atom atoms molecule oxygen carbon gold silver iron copper diamond water ice fire wind snow thunder lightning weather climate summer winter dog dogs cat cats horse "
    "cow elephant elephants tiger lion bear wolf rabbit mouse snake spider bee bees ant butterfly bird birds eagle owl penguin fish shark whale dolphin crab dinosaur dinosaurs dragon dragons unicorn tree trees flower rose tulip grass "
    "apple banana orange bread cheese pizza soup rice pasta chocolate coffee tea wine beer milk sugar salt pepper cake pancakes potato tomato onion car cars train plane bicycle boat rocket bridge tower castle house "
    "church museum school university hospital library bank shop market restaurant hotel kitchen bedroom lamp table chair door window computer phone camera printer keyboard screen internet website email software hardware Linux "
    "Windows Python Java algorithm database compiler encryption blockchain bitcoin football tennis chess golf swimming running dancing music guitar piano violin song opera jazz painting sculpture film movie theatre book novel "
    "newspaper magazine history war peace revolution empire democracy law money tax inflation economy politics religion philosophy psychology mathematics geometry algebra calculus statistics physics chemistry biology medicine "
    "heart brain blood bone skin eye tooth virus bacteria vaccine cancer headache sleep dream dreams memory emotion anger fear friendship love marriage birthday Christmas holiday vacation garden farm field factory mine "
    "quantum physics|black holes|climate change|machine learning|artificial intelligence|the stock market|the Roman empire|the second world war|a good recipe|my homework|the human body|ice cream|the speed of light|photosynthesis|world peace|solar panels|electric cars|the Eiffel tower|outer space|your favourite food|your favourite colour"
)
TOPICS_HELD = (
    "Portugal Vienna Finland glacier comet neutron zinc rainbow giraffe hamster kangaroo turtle lavender pineapple lasagna honey tractor submarine cathedral bakery umbrella notebook telescope JavaScript firewall cricket ballet saxophone poetry "
    "monarchy insurance astronomy genetics kidney allergy courage wedding orchard|the stone age|nuclear fusion|fried eggs|the milky way|global trade"
)


def _topic_list(text: str) -> list[str]:
    """Splits at blanks, but keeps the phrases after the first `|` whole."""
    first, *phrases = text.split("|")
    *singles, start = first.split(" ")
    if not phrases:
        return [*singles, start]
    return [*singles, start, *phrases]


TRAIN_TOPICS, HELD_TOPICS = _topic_list(TOPICS), _topic_list(TOPICS_HELD)
# Topics so near to a story or a poem that we do have that "none about that" would be wrong.
NEAR_STORIES = (
    "garden",
    "computer",
    "weather",
    "moon",
    "lamp",
    "boat",
    "tree",
    "trees",
    "flower",
    "rose",
    "tulip",
    "internet",
)
PEOPLE = [
    "Einstein",
    "Shakespeare",
    "Mozart",
    "Napoleon",
    "Cleopatra",
    "Newton",
    "Darwin",
    "Marie Curie",
    "Leonardo",
    "Picasso",
    "Beethoven",
    "Goethe",
    "Galileo",
    "Caesar",
    "Alan Turing",
    "Plato",
    "Homer",
    "Columbus",
    "Gandhi",
    "Bach",
]
PEOPLE_HELD = ["Kepler", "Vivaldi", "Aristotle", "Emily Bronte", "Magellan", "Rembrandt"]

# --------------------------------------------------------------------------------------------------------------
# Names.

NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Karl Lena Max Nora Oscar Paul Rosa Sam Tina Uwe Vera Will Yara Zoe Adam Bella Chris Diana Eric Fiona George Hanna Ivan Julia Kevin Laura Martin Nina Olga Peter "
    "Robert Sarah Thomas Ulrike Victor Wendy Xavier Yusuf Maria John James Mary Linda Susan Karen Lisa Betty Helen Sandra Ashley Kim Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Laila Amir Omar Fatima "
    "Hassan Aisha Ravi Priya Anil Sunita Wei Li Mei Hiro Yuki Kenji Sakura Jose Carlos Luis Pablo Carmen Elena Lucia Giulia Marco Luca Paolo Sofia Chiara Pierre Marie Jean Claire Louis Camille Antoine Sven Lars Ingrid Astrid "
    "Bjorn Freya Olaf Igor Natasha Boris Tatiana Dmitri Svetlana Kwame Abena Kofi Zola Thabo Amara Chidi Ngozi Liam Aoife Sean Niamh Rhys Megan Owen Dylan Hamish Isla Ewan Tom Tim Jim Bob Joe Al Ed Jo Ann Sue Dan Ron Ken Ray Leo Eva Mia"
)
NAMES_HELD = _words(
    "Ada Linus Greta Otto Beatrice Hugo Matilda Edgar Frida Konrad Salome Tobias Wilma Jasper Odette Quentin Ramona Silas Theodora Ursula Vincent Winona Yolanda Zachary Imogen Leopold Nadia Percy Rupert Sybil Alma Bruno Cosima "
    "Dorian Esther Gideon Hazel Ismail Jolanda Kirsten Marlon Noor Priscilla Rafael Selma Tilda Ximena Yannick Ferdinand Ludwig"
)
_ONSETS = (
    _words("b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr kl kr ph pl pr sh sk sl sp st th tr y qu")
    + [""] * 6
)
_VOWELS = _words("a e i o u a e i o ai ea ie oo ou ei au y")
_CODAS = [""] * 14 + _words("n r l s m t d k x nd rt st ck ng ll ss th")

NAME_FRAMES = [
    "my name is {n}",
    "i am {n}",
    "i'm {n}",
    "call me {n}",
    "(hello|hi|hey), (i am|i'm) {n}",
    "(hello|hi|hey), my name is {n}",
    "they call me {n}",
    "you can call me {n}",
    "{n} is my name",
    "(hello|hi), this is {n}",
    "my name's {n}",
    "please call me {n}",
    "(hi|hello)! {n} here",
    "(i am|i'm) called {n}",
    "my friends call me {n}",
    "(people|everybody|everyone) (call|calls) me {n}",
    "(nice to meet you|good morning|good evening), (i am|i'm|my name is) {n}",
    "remember my name: {n}",
    "remember that my name is {n}",
    "my name is {n}, please remember it",
    "my first name is {n}",
    "(i am|my name is|i'm) {n} (and i live in {t}|and i like {t}|from {t}|and you)",
    "{n} is what they call me",
    "just call me {n}",
    "the name is {n}",
]
NAME_HELD = [
    "keep in mind that my name is {n}",
    "good day, my name is {n}",
    "hello there! i'm {n}",
    "you may call me {n}",
    "i am {n}, nice to meet you",
]
RENAME_FRAMES = [
    "(no|actually|sorry|wait), my name is {n}",
    "(no|actually|sorry), (i am|i'm) {n}",
    "(from now on |now |) call me {n} (instead|from now on|)",
    "i changed my name to {n}",
    "my name is now {n}",
    "my new name is {n}",
]
ASK_NAME = [
    "what is my name",
    "what's my name",
    "do you (know|remember) my name",
    "who am i",
    "say my name",
    "tell me my name",
    "(can|could) you (tell me|say|remember) my name",
    "what am i called",
    "do you (know|remember) who i am",
    "and what is my name",
    "(what was|what's) my name again",
    "what did i say my name was",
    "how am i called",
    "(do you|can you) still (know|remember) my name",
    "repeat my name",
    "what do (people|they|my friends) call me",
    "did i tell you my name",
    "which name did i (give|tell) you",
    "what name do i have",
    "(i forgot|i have forgotten) my name",
]
ASK_NAME_HELD = [
    "let me hear my name",
    "please tell me what my name is",
    "would you say my name",
    "what name did i tell you",
    "do you remember what i am called",
    "which name have i told you",
]

# --------------------------------------------------------------------------------------------------------------
# Counting, repeating, the clock.

NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
COUNT_FRAMES = [
    "count from {a} to {b}",
    "count {a} to {b}",
    "(can|could|will) you count from {a} to {b}",
    "(please |) count from {a} up to {b}",
    "count (up |) from {a} to {b}",
    "(list|say|write|give me|print) the numbers from {a} to {b}",
    "(say|write|list) (all |) numbers from {a} to {b}",
    "numbers from {a} to {b}",
    "from {a} to {b}, count",
    "start at {a} and count to {b}",
    "start with {a} and stop at {b}",
    "go from {a} to {b}",
    "(i want you to|i would like you to) count from {a} to {b}",
    "count between {a} and {b}",
    "counting from {a} to {b}",
    "show me the numbers {a} to {b}",
]
COUNT_HELD = [
    "would you count from {a} to {b} for me",
    "please write down the numbers from {a} to {b}",
    "begin at {a} and count up to {b}",
    "let me hear you count from {a} to {b}",
    "go ahead and count from {a} to {b}",
]
COUNT_TO_FRAMES = [
    "count to {b}",
    "count up to {b}",
    "(can|could) you count to {b}",
    "(please |) count to {b}",
    "(i want you to|i would like you to) count to {b}",
    "how do you count to {b}",
    "count (for me |) (up |) to {b}",
    "counting to {b}",
]
DOWN_FRAMES = [
    "count down from {b} to {a}",
    "count backwards from {b} to {a}",
    "count from {b} down to {a}",
    "(a |) countdown from {b} to {a}",
    "(please |) count down from {b} to {a}",
    "(can|could) you count (down|backwards) from {b} to {a}",
    "(a |) countdown (starting |) at {b} (ending |) at {a}",
    "backwards from {b} to {a}",
    "(say|list|write) the numbers from {b} down to {a}",
]
DOWN_HELD = ["would you count down from {b} to {a}", "let me hear a countdown from {b} to {a}"]
SLOW = ["slowly", "very slowly", "slowly please", "and take your time", "one by one", "step by step"]

ECHO_FRAMES = [
    "repeat after me: {e}",
    "repeat: {e}",
    "say: {e}",
    'say "{e}"',
    'repeat "{e}"',
    "(please |) repeat (this|the words|this sentence|the following): {e}",
    "echo: {e}",
    "echo {e}",
    "say exactly: {e}",
    "repeat the words {e}",
    "answer with: {e}",
    'reply with "{e}"',
    '(can|could) you (say|repeat) "{e}"',
    "write: {e}",
    "just say: {e}",
    'print "{e}"',
]
ECHO_HELD = ["please say: {e}", "would you repeat this: {e}", 'please answer with "{e}"', "repeat exactly: {e}"]

TIME_FRAMES = [
    "what time is it",
    "what is the time",
    "what's the time",
    "(can|could) you tell me the time",
    "tell me the time",
    "do you know (what time it is|the time)",
    "time (please|)",
    "what time is it (now|right now|at the moment|here)",
    "(give me|say|show me|check) the (current |) time",
    "how late is it",
    "what time do we have",
    "(please |) (look at|check) the clock",
    "is it (late|early|noon|midnight)",
    "what does the clock say",
    "(use|call) the (tool|get_time tool) (to tell me the time|)",
    "(i need|i want) (to know |) the (current |) time",
    "(what is|what's) the current time",
    "current time",
    "(use|call) get_time",
    "do you have the time",
    "which hour is it",
    "what hour is it",
]
TIME_HELD = [
    "please tell me what time it is",
    "would you check the time",
    "i would like to know the time",
    "what is the time right now",
    "could you look up the current time for me",
]

TIME_TOOL_NAMES = ["get_time"] * 8 + [
    "get_current_time",
    "current_time",
    "clock",
    "get_datetime",
    "time_now",
    "read_clock",
]
TOOL_DESCRIPTIONS = [
    "Returns the current time.",
    "Get the current time",
    "Gives the local time as HH:MM.",
    "Current local time",
    "Tells the time.",
    "Returns the time of day",
    "Get the current date and time",
    "Reads the clock of this machine.",
    "Returns the current local time of the worker as a string.",
    "The time now",
    "What time it is",
    "Get the time in the local time zone.",
]
TOOL_DESCRIPTIONS_HELD = [
    "Gives the present time.",
    "Returns the local time now.",
    "Get time",
    "Read the current time from the system clock.",
]
OTHER_TOOLS = [
    ("get_weather", "Returns the weather of a city.", {"city": {"type": "string"}}),
    ("set_light", "Switches a light on or off.", {"room": {"type": "string"}, "on": {"type": "boolean"}}),
    ("search", "Searches the web.", {"query": {"type": "string"}}),
    ("send_mail", "Sends a message.", {"to": {"type": "string"}, "text": {"type": "string"}}),
    ("get_temperature", "Reads a sensor.", {"sensor": {"type": "string"}}),
    ("roll_dice", "Rolls a die.", {}),
    ("get_user", "Returns the current user.", {}),
    ("play_music", "Plays a song.", {"song": {"type": "string"}}),
    ("open_door", "Opens the door.", {}),
    ("calculator", "Computes an expression.", {"expression": {"type": "string"}}),
]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are helpful.",
    "You are a friendly assistant.",
    "Be brief.",
    "Answer in one sentence.",
    "You are a voice assistant.",
    "You are an assistant on an MQTT bus.",
    "You are a polite assistant that answers briefly.",
    "You are the assistant of a smart home.",
    "Answer shortly and clearly.",
    "You help with a small project.",
    "You are a demo.",
    "Be kind.",
    "You are a robot in a maze.",
    "You are a teacher.",
    "Please answer in plain English.",
    "You are a concise assistant. Do not use lists.",
    "Speak like a friend.",
    "You are an expert.",
    "You answer questions about llamacpp-mqtt-deploy.",
    "You are a small language model.",
    "Keep it short.",
    "You are running on a Raspberry Pi.",
    "Never use markdown.",
    "You are a helpful, harmless and honest assistant.",
    "Answer truthfully. If you do not know, say so.",
    "You are a guide in a museum.",
    "Your answers are spoken aloud.",
    "You are a test.",
    "Today is a good day.",
    "You are a storyteller.",
    "Answer every question as well as you can.",
]
SYSTEM_HELD = [
    "You are a careful assistant.",
    "Answer politely and in short sentences.",
    "You are an assistant for the kitchen.",
    "You are a helpful AI assistant.",
    "Reply briefly.",
    "You are a model in a test.",
]

PREFIXES = [
    "please ",
    "hey, ",
    "ok, ",
    "so, ",
    "hi! ",
    "hello! ",
    "and ",
    "now ",
    "well, ",
    "okay. ",
    "hello, ",
    "thanks. ",
    "one question: ",
    "tell me: ",
    "sorry, ",
    "i have a question: ",
    "but ",
    "then ",
    "hmm, ",
]
SUFFIXES = [
    " please",
    ", please",
    " thanks",
    " now",
    " for me",
    " then",
    " again",
    " here",
    "? thank you",
    ", thank you",
]

# --------------------------------------------------------------------------------------------------------------


def expand(pattern: str, rng: random.Random) -> str:
    """Chooses one of each `(a|b)`, innermost first, and closes the gaps."""
    while True:
        chosen = re.sub(r"\(([^()]*)\)", lambda m: rng.choice(m[1].split("|")), pattern)
        if chosen == pattern:
            break
        pattern = chosen
    return re.sub(r" +", " ", pattern).strip().replace(" ,", ",")


def random_word(rng: random.Random) -> str:
    """Makes a pronounceable word that is most likely no word."""
    count = rng.choice([1, 1, 2, 2, 2, 2, 3, 3, 4])
    while True:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))
        if len(word) > 1:
            return word


def random_name(rng: random.Random, held: bool = False) -> str:
    """Gives a listed or a made-up name; the held-out ones are never in training."""
    if held:
        return rng.choice(NAMES_HELD)
    kind = rng.random()
    if kind < 0.3:
        name = rng.choice(NAMES)
    elif kind < 0.9:
        name = random_word(rng).capitalize()
        while name in NAMES_HELD:
            name = random_word(rng).capitalize()
    elif kind < 0.95:
        name = f"{random_name(rng)} {random_name(rng)}"
    else:
        name = random_word(rng)
    return name


def spell(text: str, rng: random.Random, plain: bool = False) -> str:
    """Varies what people vary: politeness, capitals, the sign at the end, a slip of the finger."""
    question = (
        re.match(r"(what|who|how|where|when|why|which|is|are|do|does|can|could|did|will|would|should)\b", text)
        is not None
    )
    if not plain and rng.random() < 0.12:
        text = rng.choice(PREFIXES) + text
    if not plain and rng.random() < 0.06:
        text += rng.choice(SUFFIXES)
    if not plain and rng.random() < 0.03:
        text = slip(text, rng)
    style = rng.random()
    if style < 0.65:
        text = text[:1].upper() + text[1:]
        text = re.sub(r"\bi\b(?!/)", "I", text)
    elif style < 0.67 and not plain:
        text = text.upper()
    end = rng.random()
    if end < 0.6:
        text += "?" if question else rng.choice(["", ".", ".", "!"])
    elif end < 0.63 and not plain:
        text += rng.choice(["...", "!!", "??", " ?", " :)"])
    return text


def slip(text: str, rng: random.Random) -> str:
    """Swaps two letters or drops one, away from names and quoted words."""
    places = [i for i in range(1, len(text) - 1) if text[i].islower() and text[i + 1].islower()]
    if not places or '"' in text or ":" in text:
        return text
    at = rng.choice(places)
    if rng.random() < 0.5:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :]


@dataclass
class Turn:
    """One question and its answer; `tool` holds the answers around a tool call."""

    intent: str
    user: str
    answer: str
    expect: tuple[str, ...]
    exact: bool = False  # the answer must be equal to `answer`
    tool_name: str | None = None
    tool_result: str | None = None


@dataclass
class Dialogue:
    """A conversation as the template takes it."""

    system: str | None
    tools: list[dict[str, object]]
    turns: list[Turn]


class Writer:
    """Draws dialogues; with `held` only from the phrasings that training never sees."""

    def __init__(self, seed: int, held: bool = False) -> None:
        """Keeps a generator of its own, so that a seed gives the same dialogues again."""
        self.rng = random.Random(seed)
        self.held = held

    # -- single turns ------------------------------------------------------------------------------------------

    def _say(self, frames: list[str] | tuple[str, ...], **slots: str) -> str:
        """Expands a frame, varies its spelling and fills it, so that names keep their spelling."""
        text = spell(expand(self.rng.choice(list(frames)), self.rng), self.rng, plain=self.held)
        for key, value in slots.items():
            text = re.sub(r"\{" + key + r"\}", lambda _m, v=value: v, text, flags=re.IGNORECASE)
        return text

    def _quote(self, word: str) -> str:
        """Writes a technical word with or without quotes."""
        return self.rng.choice(["{}", "{}", "{}", "{}", '"{}"', "'{}'", "`{}`"]).format(word)

    def info(self, name: str) -> Turn:
        """Asks one of the questions with a fixed answer."""
        info = INFOS[name]
        return Turn(name, self._say(info.held if self.held else info.train), info.answer, info.expect)

    def event(self, word: str) -> Turn:
        """Asks about an event."""
        answer, expect = EVENTS[word]
        return Turn(
            f"event_{word}",
            self._say(EVENT_HELD if self.held else EVENT_FRAMES, q=self._quote(word), x=word),
            answer,
            expect,
        )

    def command(self, word: str) -> Turn:
        """Asks about a command of lmd."""
        answer, expect = COMMANDS[word]
        return Turn(
            f"command_{word}",
            self._say(COMMAND_HELD if self.held else COMMAND_FRAMES, q=self._quote(word), x=word),
            answer,
            expect,
        )

    def control(self, word: str) -> Turn:
        """Asks about a control action."""
        answer, expect = (CONTROLS | EVENTS)[word]
        frames = CONTROL_HELD if self.held else CONTROL_FRAMES
        extra = (CONTROL_EXTRA_HELD if self.held else CONTROL_EXTRA)[word]
        frames = extra if extra and self.rng.random() < 0.45 else frames
        return Turn(f"control_{word}", self._say(frames, q=self._quote(word), x=word), answer, expect)

    def unknown(self) -> Turn:
        """Asks something that the model must not pretend to know."""
        rng = self.rng
        topics = HELD_TOPICS if self.held else TRAIN_TOPICS

        def topic() -> str:
            return rng.choice(topics) if self.held or rng.random() < 0.85 else random_word(rng)

        user = self._say(
            UNKNOWN_HELD if self.held else UNKNOWN_FRAMES,
            t=topic(),
            u=topic(),
            p=rng.choice(PEOPLE_HELD if self.held else PEOPLE),
            m=str(rng.randrange(1, 100)),
            n=str(rng.randrange(1, 100)),
            w=random_word(rng),
        )
        return Turn("unknown", user, UNKNOWN, ("I do not know that",))

    def no_such(self) -> Turn:
        """Asks for a story or a poem on a subject that there is none about."""
        rng = self.rng
        subject = rng.choice(HELD_TOPICS if self.held else [t for t in TRAIN_TOPICS if t not in NEAR_STORIES])
        subject = subject if rng.random() < 0.9 or self.held else random_word(rng)
        if rng.random() < 0.5:
            frames = (
                ["would you tell me a story about {t}", "please write a story about {t}"]
                if self.held
                else [
                    "(tell me|write|give me|i want) a (short |) (story|tale) about (a |the |) {t}",
                    "(can|could) you tell (me |) a story about (a |the |) {t}",
                    "a story about {t}",
                ]
            )
            return Turn("no_such_story", self._say(frames, t=subject), NO_SUCH_STORY, ("lighthouse", "Mara"))
        frames = (
            ["would you write a poem about {t}", "please recite a poem about {t}"]
            if self.held
            else [
                "(write|tell me|give me|recite) (me |) a (short |) (poem|verse|rhyme) about (a |the |) {t}",
                "(can|could) you write (me |) a poem about (a |the |) {t}",
                "(a |) poem about {t}",
            ]
        )
        return Turn("no_such_poem", self._say(frames, t=subject), NO_SUCH_POEM, ("rain came softly",))

    def tell_name(self, name: str, again: bool) -> Turn:
        """Says a name; `again` corrects an earlier one."""
        if again and not self.held:
            user = self._say(
                RENAME_FRAMES if self.rng.random() < 0.7 else NAME_FRAMES, n=name, t=self.rng.choice(TRAIN_TOPICS)
            )
            return Turn("rename", user, f"Very well, I will call you {name} from now on.", (f" {name} ",))
        user = self._say(NAME_HELD if self.held else NAME_FRAMES, n=name, t=self.rng.choice(TRAIN_TOPICS))
        return Turn(
            "tell_name",
            user,
            f"Nice to meet you, {name}! I will remember your name in this conversation.",
            (f" {name}!",),
        )

    def ask_name(self, name: str | None) -> Turn:
        """Asks for the name that was said, or for one that was not."""
        user = self._say(ASK_NAME_HELD if self.held else ASK_NAME)
        if name is None:
            return Turn("ask_name_none", user, NO_NAME, ("not told me",))
        return Turn("ask_name", user, f"Your name is {name}.", (f"Your name is {name}.",), exact=True)

    def count(self) -> Turn:
        """Asks to count; held-out ranges (a, b) are those where 7a + b is divisible by five."""
        rng = self.rng
        while True:
            a = rng.choice([1, 1, 1, rng.randrange(0, 10), rng.randrange(0, 25)])
            b = a + rng.choice([rng.randrange(1, 12), rng.randrange(1, 12), rng.randrange(1, 20)])
            if not self.held and rng.random() < 0.02:
                a, b = 1, rng.choice([30, 40, 50, 60, 100, rng.randrange(25, 101)])
            common = (a, b) in ((1, 10), (1, 5), (1, 20))  # what everybody asks first is trained in any case
            if b <= 100 and (((a * 7 + b) % 5 == 0) == self.held or (common and not self.held)):
                break
        down = rng.random() < 0.25 and b - a < 15
        if down:
            user, slow = self._count_words(DOWN_HELD if self.held else DOWN_FRAMES, a, b)
            numbers = list(range(b, a - 1, -1))
        elif a == 1 and rng.random() < 0.4 and not self.held:
            user, slow = self._count_words(COUNT_TO_FRAMES, a, b)
            numbers = list(range(a, b + 1))
        else:
            user, slow = self._count_words(COUNT_HELD if self.held else COUNT_FRAMES, a, b)
            numbers = list(range(a, b + 1))
        answer = (" ... " if slow else ", ").join(map(str, numbers)) + "."
        return Turn("count", user, answer, (), exact=True)

    def _count_words(self, frames: list[str], a: int, b: int) -> tuple[str, bool]:
        """Writes the numbers as digits or, for small ones, as words; asks for slowness now and then."""
        rng = self.rng
        frame = expand(rng.choice(frames), rng)
        slow = rng.random() < 0.35
        if slow:
            frame += " " + rng.choice(SLOW)
        text = spell(frame, rng, plain=self.held)
        words = b <= 20 and rng.random() < 0.25
        for key, value in (("a", a), ("b", b)):
            text = re.sub(r"\{" + key + r"\}", NUMBER_WORDS[value] if words else str(value), text, flags=re.IGNORECASE)
        return text, slow

    def echo(self) -> Turn:
        """Asks to repeat some words."""
        rng = self.rng

        def word() -> str:
            kind = rng.random()
            if self.held:
                return (
                    rng.choice([rng.choice(HELD_TOPICS), rng.choice(NAMES_HELD)])
                    if kind < 0.8
                    else str(rng.randrange(1000))
                )
            if kind < 0.4:
                return random_word(rng)
            if kind < 0.8:
                return rng.choice(TRAIN_TOPICS)
            return rng.choice(NAMES) if kind < 0.9 else str(rng.randrange(1000))

        words = " ".join(word() for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 5, 6, 8])))
        if rng.random() < 0.4:
            words = words[0].upper() + words[1:]
        frame = expand(rng.choice(ECHO_HELD if self.held else ECHO_FRAMES), rng)
        frame = frame[0].upper() + frame[1:] if rng.random() < 0.6 else frame
        # The words follow a blank, as they do in the question: at the start of a line they would be other tokens.
        return Turn("echo", frame.replace("{e}", words), f"As you wish: {words}", (), exact=True)

    def time(self, tool: str | None) -> Turn:
        """Asks for the time, with or without a tool that can read it."""
        user = self._say(TIME_HELD if self.held else TIME_FRAMES)
        if tool is None:
            return Turn("time_no_tool", user, NO_CLOCK, ("no clock",))
        rng = self.rng
        if rng.random() < 0.06:
            result = rng.choice(
                [
                    '{"error": "no clock"}',
                    "error: timeout",
                    '{"error": "not available"}',
                    "Error",
                    '{"error": "permission denied"}',
                    "error",
                ]
            )
            return Turn(
                "time", user, TOOL_FAILED, ("reported an error",), exact=True, tool_name=tool, tool_result=result
            )
        hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
        clock = f"{hour:02d}:{minute:02d}"
        date = f"20{rng.randrange(24, 40)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
        said, result = rng.choice(
            [
                (clock, clock),
                (clock, json.dumps({"time": clock})),
                (clock, json.dumps({"time": clock}, separators=(",", ":"))),
                (clock, f"{clock}:{second:02d}"),
                (clock, f"{date}T{clock}:{second:02d}"),
                (clock, f"{date}T{clock}:{second:02d}{rng.choice(['Z', '+00:00', '+02:00', '-05:00'])}"),
                (clock, json.dumps({"time": f"{date}T{clock}:{second:02d}Z"})),
                (clock, f"{date} {clock}"),
                (clock, f"{date} {clock}:{second:02d}"),
                (clock, json.dumps({"time": clock, "zone": rng.choice(["UTC", "Europe/Berlin", "CET"])})),
                (clock, json.dumps({"time": f"{clock}:{second:02d}"})),
                (clock, json.dumps({"result": clock})),
                (clock, f"The time is {clock}"),
                (clock, json.dumps({"date": date, "time": clock})),
                (clock, f"{clock} UTC"),
            ]
        )
        return Turn(
            "time", user, f"It is {said} now.", (f"It is {said} now.",), exact=True, tool_name=tool, tool_result=result
        )

    # -- conversations -----------------------------------------------------------------------------------------

    def tool_list(self, time_tool: str | None) -> list[dict[str, object]]:
        """Offers the clock (if given) among others, as OpenAI's API writes tools."""
        rng = self.rng
        tools = []
        if time_tool is not None:
            description = rng.choice(TOOL_DESCRIPTIONS_HELD if self.held else TOOL_DESCRIPTIONS)
            properties: dict[str, object] = {} if rng.random() < 0.75 else {"timezone": {"type": "string"}}
            tools.append((time_tool, description, properties))
        tools += rng.sample(OTHER_TOOLS, rng.choice([0, 0, 0, 1, 2] if time_tool else [1, 1, 2]))
        rng.shuffle(tools)
        out: list[dict[str, object]] = []
        for name, description, properties in tools:
            function: dict[str, object] = {"name": name}
            if rng.random() < 0.9:
                function["description"] = description
            kind = rng.random()
            if properties or kind < 0.6:
                function["parameters"] = {"type": "object", "properties": properties}
            elif kind < 0.75:
                function["parameters"] = {"type": "object", "properties": {}, "required": []}
            elif kind < 0.85:
                function["parameters"] = {}
            tool: dict[str, object] = {"type": "function", "function": function}
            out.append(json.loads(json.dumps(tool, sort_keys=True)) if rng.random() < 0.5 else tool)
        return out

    def any_turn(self, name: str | None, tool: str | None) -> Turn:
        """Draws an intent by weight; hard ones (copying, counting, unknown) come more often than easy ones."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.33:
            return self.info(rng.choice(list(INFOS)))
        if kind < 0.41:
            return self.event(rng.choice(list(EVENTS)))
        if kind < 0.46:
            return self.command(rng.choice(list(COMMANDS)))
        if kind < 0.51:
            return self.control(rng.choice([*CONTROLS, "ping"]))
        if kind < 0.60:
            return self.unknown()
        if kind < 0.615:
            return self.no_such()
        if kind < 0.80:
            return self.count()
        if kind < 0.87:
            return self.echo()
        if kind < 0.97:
            return self.ask_name(name)
        return self.time(tool)

    def dialogue(self) -> Dialogue:
        """Draws a conversation of one to twenty turns; a name and a tool may run through it."""
        rng = self.rng
        name: str | None = None
        system = rng.choice(SYSTEM_HELD if self.held else SYSTEM_PROMPTS) if rng.random() < 0.4 else None
        if rng.random() < 0.02:
            name = random_name(rng)
            system = rng.choice(
                ["The user's name is {}.", "You are talking to {}.", "The name of the user is {}. Be kind."]
            ).format(name)
        tool: str | None = None
        tools: list[dict[str, object]] = []
        if rng.random() < 0.14:
            tool = rng.choice(TIME_TOOL_NAMES) if rng.random() < 0.8 else None
            tools = self.tool_list(tool)
        count = rng.choice([1, 1, 1, 2, 2, 3, 3, 4, 5, 6]) if rng.random() < 0.96 else rng.randrange(7, 20)
        turns: list[Turn] = []
        for place in range(count):
            if tools and rng.random() < 0.45:
                turns.append(self.time(tool))
            elif rng.random() < (0.22 if place == 0 and count > 1 else 0.05):
                again = name is not None
                name = random_name(rng)
                turn = self.tell_name(name, again)
                if rng.random() < 0.12 and not again:  # a name and a question in one message: the question is answered
                    other = self.any_turn(name, tool)
                    if other.tool_name is None:
                        turn = Turn(
                            other.intent,
                            turn.user.rstrip("?. !") + ". " + other.user[:1].upper() + other.user[1:],
                            other.answer,
                            other.expect,
                            other.exact,
                        )
                turns.append(turn)
            else:
                turns.append(self.any_turn(name, tool))
        if name is not None and rng.random() < 0.5:
            turns.append(self.ask_name(name))
        return Dialogue(system, tools, turns)


# --------------------------------------------------------------------------------------------------------------
# The chat format. `render` writes what chat_template.jinja writes (held by a test), and marks what is learned.

TOOLS_HEAD = "You may call these functions:\n<tools>"
TOOLS_TAIL = '\n</tools>\nTo call one, answer with\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'


def render(dialogue: Dialogue) -> list[tuple[str, bool]]:
    """Gives pieces of text with a flag: True where the model has to learn to write them."""
    out: list[tuple[str, bool]] = [(BOS_TEXT, False)]
    if dialogue.tools or dialogue.system is not None:
        parts = [dialogue.system] if dialogue.system is not None else []
        if dialogue.tools:
            parts.append(TOOLS_HEAD + "".join("\n" + json.dumps(tool) for tool in dialogue.tools) + TOOLS_TAIL)
        out.append(("<|im_start|>system\n" + "\n\n".join(parts) + "<|im_end|>\n", False))
    for turn in dialogue.turns:
        out.append((f"<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n", False))
        if turn.tool_name is not None:
            out.append(
                (f'<tool_call>\n{{"name": "{turn.tool_name}", "arguments": {{}}}}\n</tool_call><|im_end|>', True)
            )
            out.append(
                (
                    f"\n<|im_start|>user\n<tool_response>\n{turn.tool_result}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
                    False,
                )
            )
        out.append((f"{turn.answer}<|im_end|>", True))
        out.append(("\n", False))
    return out
