// A network that is there at once.
#pragma once
#include "Arduino.h"

enum { WL_CONNECTED = 3 };
struct WiFiClient {};
struct HostWiFi {
  void begin(const char *, const char *) {}
  int status() { return WL_CONNECTED; }
};
extern HostWiFi WiFi;
