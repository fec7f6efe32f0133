// What the sketch uses of Arduino, on the host: a clock that the test sets, and a serial line that the test reads.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

using byte = uint8_t;

inline uint32_t &host_clock() {
  static uint32_t now = 0;
  return now;
}
inline uint32_t millis() { return host_clock(); }
inline void delay(uint32_t ms) { host_clock() += ms; }
inline uint32_t esp_random() {
  static std::random_device source;
  return source();
}

// One line to the test: its kind and its text, with what would break the line escaped.
inline void host_tell(const char *kind, const std::string &text) {
  std::string safe;
  for (char one : text) {
    if (one == '\\') safe += "\\\\";
    else if (one == '\n') safe += "\\n";
    else safe += one;
  }
  printf("%s %s\n", kind, safe.c_str());
  fflush(stdout);
}

struct HostSerial {
  void begin(long) {}
  void print(const char *text) {
    if (*text) host_tell("serial", text);
  }
  void println(const char *text) { host_tell("serial", std::string(text) + "\n"); }
};
extern HostSerial Serial;
