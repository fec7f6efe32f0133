// Asks the model and prints the answer as it comes. Libraries: PubSubClient 2.8, ArduinoJson 7.
#include <WiFi.h>
#include <PubSubClient.h>
#include <ArduinoJson.h>

#include "answer.h"

const char *REQUEST = "llm/request/esp32", *REPLY = "llm/reply/esp32";
// Larger messages are dropped without a word: the worker's limits.max_event_bytes, the topic's length and 8 more must fit.
const uint16_t BUFFER_BYTES = 4096;

WiFiClient net;
PubSubClient mqtt(net);
Answer answer;
std::string id, payload;

void publish_request() {  // with QoS 0, PubSubClient has no other: it may get lost, and is then sent again
  mqtt.publish(REQUEST, payload.c_str());
  answer.asked(millis());
}

void ask(const char *prompt) {
  char random_id[17];
  snprintf(random_id, sizeof random_id, "%08x%08x", (unsigned)esp_random(), (unsigned)esp_random());
  id = random_id;
  JsonDocument request;
  request["request_id"] = id;
  request["prompt"] = prompt;
  payload.clear();
  serializeJson(request, payload);
  answer.begin(millis());
  publish_request();
}

void on_message(char *topic, byte *bytes, unsigned int length) {
  JsonDocument json;
  if (deserializeJson(json, bytes, length)) return;
  const char *whose = json["request_id"] | "";
  if (id != whose || answer.ended) return;  // another request's, or after the end
  AnswerEvent event;
  event.type = json["type"] | "";
  event.seq = json["seq"] | -1L;
  event.next_seq = json["next_seq"] | -1L;
  event.final = json["final"] | false;
  if (!(json["content_omitted"] | false)) {
    for (const char *name : {"content", "full_content", "partial_content"}) {
      if (json[name].is<const char *>()) event.text = json[name];
    }
  }
  Serial.print(answer.feed(event, millis()).c_str());
  if (!answer.ended) return;
  const char *error = json["message"] | "";  // of a `done` it is an object, of an `error` a text
  Serial.println(answer.complete ? "" : *error ? error : " [incomplete]");
}

void setup() {
  Serial.begin(115200);
  WiFi.begin("network", "password");
  while (WiFi.status() != WL_CONNECTED) delay(200);
  mqtt.setServer("broker.lan", 1883);
  mqtt.setBufferSize(BUFFER_BYTES);
  mqtt.setCallback(on_message);
}

void loop() {
  if (!mqtt.connected()) {
    if (!mqtt.connect("esp32-kitchen", "esp32", "password")) {
      delay(2000);
      return;
    }
    mqtt.subscribe(REPLY, 1);  // a broker takes what comes on one connection in its order: this before the request
    if (id.empty()) ask("Say good morning.");
    else if (!answer.ended) publish_request();  // what was lost with the connection
  }
  mqtt.loop();
  if (answer.asks_again(millis())) publish_request();
}
