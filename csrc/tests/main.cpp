// Runs the claims about the kernels of every CPU target that this processor can run.
//
//     kernel_test             all claims
//     kernel_test WORD ...    those with one of the words in their name
#include <chrono>

#include "claims.h"

namespace topk_test {
namespace {

bool is_wanted(const std::string& name, int num_words, char** words) {
  for (int n = 0; n < num_words; ++n)
    if (name.find(words[n]) != std::string::npos) return true;
  return num_words == 0;
}

struct Score {
  int num_passed = 0, num_failed = 0;
};

void check(const char* kernels, const std::vector<Claim>& claims, int num_words, char** words, Score& score) {
  for (const Claim& claim : claims) {
    const std::string name = std::string(kernels) + ": " + claim.name;
    if (!is_wanted(name, num_words, words)) continue;
    const auto start = std::chrono::steady_clock::now();
    context = "";
    num_complaints = 0;
    most_roundings = 0;
    claim.check();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s %s (%.1f s, %.2f roundings)\n", num_complaints == 0 ? "ok    " : "FAILED", name.c_str(), seconds,
                most_roundings);
    std::fflush(stdout);
    ++(num_complaints == 0 ? score.num_passed : score.num_failed);
  }
}

}  // namespace
}  // namespace topk_test

int main(int argc, char** argv) {
  using namespace topk_test;
  std::printf("targets:");
  for (const std::string& name : topk::available_targets()) std::printf(" %s", name.c_str());
  std::printf("\n");
  Score score;
  check("attention", attention_claims, argc - 1, argv + 1, score);
  check("feed-forward", feed_forward_claims, argc - 1, argv + 1, score);
  std::printf("%d passed, %d failed\n", score.num_passed, score.num_failed);
  return score.num_failed == 0 && score.num_passed > 0 ? 0 : 1;
}
