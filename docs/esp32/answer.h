// Reads the events of one request by the protocol's rules for clients. Plain C++11: it needs neither Arduino nor a JSON library.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

// What matters of an event. `text` is `content`, `full_content` or `partial_content`, and null where the event has none.
struct AnswerEvent {
  const char *type = "";
  const char *text = nullptr;
  long seq = -1;
  long next_seq = -1;
  bool final = false;
};

class Answer {
 public:
  static constexpr uint32_t SILENCE_MS = 45000;  // three heartbeats of the worker
  static constexpr uint32_t HOLE_MS = 1000;      // how often a lost chunk is asked for

  bool ended = true;
  bool complete = false;  // after the end: whether `text` is the whole answer
  std::string text;       // the chunks, joined

  void begin(uint32_t now) {
    *this = Answer();
    ended = false;
    asked(now);
  }

  // The request was published, for the first time or again.
  void asked(uint32_t now) { asked_ = heard_ = now; }

  // Whether the same request, with the same id and the same bytes, is to be published again now.
  bool asks_again(uint32_t now) const {
    if (ended) return false;
    return now - heard_ >= SILENCE_MS || (missing_ && now - asked_ >= HOLE_MS);
  }

  // Takes an event of this request and returns the text that is new.
  std::string feed(const AnswerEvent &event, uint32_t now) {
    if (ended) return "";
    heard_ = now;
    if (event.final) return end(event);
    if (!strcmp(event.type, "chunk")) return chunk(event);
    if (!strcmp(event.type, "snapshot") && event.next_seq >= next_) return snapshot(event);
    return "";
  }

 private:
  long next_ = 0;         // the number of the next chunk
  bool missing_ = false;  // a chunk is missing that a snapshot can still bring
  bool lost_ = false;     // a piece is missing that was too large for a snapshot
  uint32_t asked_ = 0, heard_ = 0;

  std::string chunk(const AnswerEvent &event) {
    if (event.seq > next_) missing_ = true;
    if (event.seq != next_) return "";
    next_++;
    return more(event.text ? event.text : "");
  }

  std::string snapshot(const AnswerEvent &event) {
    bool hole = event.next_seq > next_;
    next_ = event.next_seq;
    missing_ = false;
    if (event.text) return rest_of(event.text);
    if (!hole) return "";
    lost_ = true;  // too large for an event: go on behind the hole, the end may bring the whole
    return more(" [...] ");
  }

  std::string end(const AnswerEvent &event) {
    ended = true;
    bool done = !strcmp(event.type, "done");
    complete = done && (event.text != nullptr || (event.seq == next_ && !lost_));
    return event.text ? rest_of(event.text) : "";
  }

  // `whole` is all of the text up to here. After a loss it does not begin with what was read, and takes its place.
  std::string rest_of(const std::string &whole) {
    if (whole.compare(0, text.size(), text) == 0) return more(whole.substr(text.size()));
    if (whole.size() < text.size() && !lost_) return "";
    text = whole;
    lost_ = false;
    return "\n" + whole;
  }

  std::string more(const std::string &news) {
    text += news;
    return news;
  }
};
