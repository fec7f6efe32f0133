// Runs the sketch on the host. Every line of standard input is one thing that happens to the board; `loop` runs after each, and
// a line with a dot says that it has run.
#include "Arduino.h"
#include "WiFi.h"

HostSerial Serial;
HostWiFi WiFi;

#include SKETCH

#include <iostream>

int main() {
  setup();
  for (std::string line; std::getline(std::cin, line);) {
    std::string kind = line.substr(0, line.find(' ')), rest = line.size() > kind.size() ? line.substr(kind.size() + 1) : "";
    if (kind == "wait") delay(std::stoul(rest));
    else if (kind == "message") mqtt.host_deliver(REPLY, rest);
    else if (kind == "disconnect") mqtt.host_disconnect();
    loop();
    host_tell(".", "");
  }
}
