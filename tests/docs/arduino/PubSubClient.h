// PubSubClient 2.8 as far as the sketch uses it. It drops a message that is larger than its buffer without a word, as the real one.
#pragma once
#include "WiFi.h"

class PubSubClient {
 public:
  using Callback = void (*)(char *, byte *, unsigned int);

  explicit PubSubClient(WiFiClient &) {}
  void setServer(const char *, uint16_t) {}
  bool setBufferSize(uint16_t size) {
    buffer_ = size;
    return true;
  }
  void setCallback(Callback callback) { callback_ = callback; }
  bool connected() { return connected_; }
  bool connect(const char *, const char *, const char *) {
    host_tell("connect", "");
    return connected_ = true;
  }
  bool subscribe(const char *topic, uint8_t) {
    host_tell("subscribe", topic);
    return true;
  }
  bool publish(const char *topic, const char *payload) {
    if (!connected_ || 5 + 2 + strlen(topic) + strlen(payload) > buffer_) return false;
    host_tell("publish", payload);
    return true;
  }
  bool loop() { return connected_; }

  void host_disconnect() { connected_ = false; }
  void host_deliver(std::string topic, std::string payload) {
    size_t rest = 2 + topic.size() + 2 + payload.size();  // topic with its length, packet id of QoS 1
    size_t length_bytes = rest < 128 ? 1 : rest < 16384 ? 2 : 3;
    if (!connected_ || 1 + length_bytes + rest > buffer_) {
      host_tell("dropped", std::to_string(payload.size()));
      return;
    }
    callback_(&topic[0], reinterpret_cast<byte *>(&payload[0]), payload.size());
  }

 private:
  uint16_t buffer_ = 256;
  bool connected_ = false;
  Callback callback_ = nullptr;
};
