# Fit InstEval with lme4, whose own data set it is.
suppressPackageStartupMessages(library(lme4))
data(InstEval)
seconds <- system.time(
  fit <- lmer(y ~ 1 + (1 | s) + (1 | d), InstEval, REML = FALSE)
)[["elapsed"]]
sd <- as.data.frame(VarCorr(fit))
of <- function(group) sd$sdcor[sd$grp == group]
cat(sprintf(
  '{"version": "lme4 %s", "steps": null, "clock": [%f], "figures": [[%f, %f, %f, %f]]}\n',
  packageVersion("lme4"), seconds, fixef(fit), of("s"), of("d"), of("Residual")
))
