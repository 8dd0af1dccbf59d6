// SPDX-License-Identifier: Apache-2.0
// Just enough JSON to write a report.
#ifndef XSHARE_BENCH_JSON_H
#define XSHARE_BENCH_JSON_H

#include <string>
#include <utility>
#include <vector>

// One value, as the text that stands for it.
class Json {
  public:
    Json(double number);
    Json(int number) : text_(std::to_string(number)) {}
    Json(const std::string& string);
    Json(const char* string) : Json(std::string(string)) {}
    static Json null() { return Json(Raw{}, "null"); }
    static Json array(const std::vector<Json>& items);
    static Json object(const std::vector<std::pair<std::string, Json>>& fields);

    const std::string& text() const { return text_; }

  private:
    struct Raw {};
    Json(Raw, std::string text) : text_(std::move(text)) {}

    std::string text_;
};

// Throws UsageError where no file could be written there: before hours of measuring, not after.
void check_writable(const std::string& path);

// Written beside `path` and renamed, so that it is whole or absent. Throws Error.
void write_file(const std::string& path, const std::string& text);

#endif  // XSHARE_BENCH_JSON_H
